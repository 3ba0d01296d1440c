"""The Kubernetes manifests hang together: selectors find pods, probes and monitors find the port, options exist."""

import json
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "serve" / "k8s"
SERVERS = ("kimi.yaml", "sessions.yaml")


def load(name):
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


def options(name):
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    [container] = load(name)["Deployment"]["spec"]["template"]["spec"]["containers"]
    model, *words = container["args"]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *words])


@pytest.mark.parametrize("name", SERVERS)
def test_services_and_the_monitor_select_the_pods_and_their_port(name):
    objects, monitor = load(name), load("podmonitor.yaml")["PodMonitor"]
    deployment, service = objects["Deployment"], objects["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert (monitor["spec"]["selector"]["matchLabels"] == labels) == (name == "kimi.yaml")
    assert {port["name"]} == {
        service["spec"]["ports"][0]["targetPort"],
        monitor["spec"]["podMetricsEndpoints"][0]["port"],
    }
    assert all(
        container[probe]["httpGet"] == {"path": "/health", "port": "http"} for probe in container if "Probe" in probe
    )


@pytest.mark.parametrize(("name", "kept"), [("kimi.yaml", "models"), ("sessions.yaml", "sessions")])
def test_volumes_exist_and_the_user_is_the_image_s(name, kept):
    objects = load(name)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted == set(volumes)
    claim = volumes[kept]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}" in dockerfile
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]


def test_objects_of_two_files_have_names_of_their_own():
    names = [(kind, found["metadata"]["name"]) for name in SERVERS for kind, found in load(name).items()]
    assert len(names) == len(set(names))


def test_vllm_knows_the_options_and_no_remote_code_runs_by_default():
    parsed = options("kimi.yaml")
    assert (parsed.max_num_seqs, parsed.tool_call_parser) == (128, "kimi_k2")
    assert not parsed.trust_remote_code


def test_sessions_lie_on_the_volume_fit_into_it_and_are_written_to_their_end():
    from kimi_vllm.options import KimiOptions

    parsed, objects = options("sessions.yaml"), load("sessions.yaml")
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    given = parsed.additional_config
    kimi = KimiOptions.checked((json.loads(given) if isinstance(given, str) else given)["kimi"])
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == "sessions"]
    assert kimi.session_dir == mount["mountPath"]
    storage = objects["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    assert kimi.session_gib < int(storage.removesuffix("Gi"))
    profile = yaml.safe_load((FOLDER.parents[1] / "configs" / "serve" / "cpu-demo.yaml").read_text())
    stopping = container["lifecycle"]["preStop"]["sleep"]["seconds"] + profile["shutdown-timeout"]
    assert stopping < pod["terminationGracePeriodSeconds"]
