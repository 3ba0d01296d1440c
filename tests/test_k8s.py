"""The Kubernetes manifests hang together: selectors find pods, probes and monitors find the port, options exist."""

from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[1] / "serve" / "k8s"


def load(name):
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


def test_service_and_monitor_select_the_pods_and_their_port():
    objects, monitor = load("kimi.yaml"), load("podmonitor.yaml")["PodMonitor"]
    deployment, service = objects["Deployment"], objects["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == monitor["spec"]["selector"]["matchLabels"] == labels
    assert {port["name"]} == {
        service["spec"]["ports"][0]["targetPort"],
        monitor["spec"]["podMetricsEndpoints"][0]["port"],
    }
    assert all(
        container[probe]["httpGet"] == {"path": "/health", "port": "http"} for probe in container if "Probe" in probe
    )


def test_volumes_exist_and_the_user_is_the_image_s():
    objects = load("kimi.yaml")
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}" in dockerfile


def test_vllm_knows_the_options_and_no_remote_code_runs_by_default():
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    [container] = load("kimi.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    model, *options = container["args"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *options])
    assert (parsed.max_num_seqs, parsed.tool_call_parser) == (128, "kimi_k2")
    assert not parsed.trust_remote_code
