"""The Dockerfile as text: who runs what. That it builds and serves shows `make container`."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SERVING = ["cpu", "cuda"]


def stages():
    """The instructions of each stage by its name, as (word, rest), continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found = {}
    for line in filter(None, "\n".join(lines).replace("\\\n", "").splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            instructions = found[rest.split(" AS ")[1]] = []
        elif found:
            instructions.append((word, rest))
    return found


def only(stage, word):
    [value] = [rest for name, rest in stages()[stage] if name == word]
    return value


def first_run(stage):
    return next(rest for word, rest in stages()[stage] if word == "RUN")


def installed(stage):
    """Debian's packages in a stage."""
    [words] = re.findall(r"apt-get install -y --no-install-recommends ([^&]+)", first_run(stage))
    return set(words.split())


@pytest.fixture
def parse():
    """What the `vllm` command makes of its words, which is more than what the parser of `serve` does alone."""
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(commands)

    def parse(stage, words):
        program, *first = json.loads(only(stage, "ENTRYPOINT"))
        assert program == "vllm"
        return parser.parse_args([*first, *words])

    return parse


@pytest.mark.parametrize("stage", SERVING)
def test_nobody_serves_as_root_and_the_models_volume_is_the_users(stage):
    users = [rest for word, rest in stages()[stage] if word == "USER"]
    assert re.fullmatch(r"[1-9]\d+", users[-1])  # a number: Kubernetes cannot tell that a name is not root's
    assert f"useradd --uid {users[-1]} " in first_run(stage)
    volume = only(stage, "VOLUME")
    assert re.search(rf"install -d -o kimi -g kimi {volume}\b", first_run(stage))
    assert any(rest.startswith(f"HF_HOME={volume}") for word, rest in stages()[stage] if word == "ENV")


@pytest.mark.parametrize("stage", SERVING)
def test_the_health_check_asks_the_port_that_is_served_with_a_program_that_is_there(stage, parse):
    parsed = parse(stage, ["some/model", "--served-model-name", "x"])
    check = json.loads(only(stage, "HEALTHCHECK").split(" CMD ")[1])
    assert check[0] in installed(stage)
    assert check[-1] == f"http://127.0.0.1:{parsed.port}/health"
    assert parsed.host is None  # all addresses: what is published reaches it
    assert str(parsed.port) == only(stage, "EXPOSE")
    assert not parsed.trust_remote_code


def test_what_the_cpu_image_serves_is_in_it(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = parse("cpu", json.loads(only("cpu", "CMD")))
    assert (ROOT / parsed.model_tag / "config.json").exists()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not [name for name in ignored if Path(parsed.model_tag).match(name)]
    assert (parsed.served_model_name, parsed.dtype, parsed.max_model_len) == (["kimi-recall"], "float32", 2048)


def test_the_cluster_and_the_compose_file_give_the_image_words_that_vllm_takes(parse):
    [pod] = [
        one for one in yaml.safe_load_all((ROOT / "serve/k8s/kimi.yaml").read_text()) if one["kind"] == "Deployment"
    ]
    [container] = pod["spec"]["template"]["spec"]["containers"]
    assert "command" not in container
    assert parse("cuda", container["args"]).model_tag == container["args"][0]
    compose = yaml.safe_load((ROOT / "serve/dashboard/docker-compose.yml").read_text())["services"]["kimi"]
    assert parse("cpu", compose["command"]).served_model_name == ["kimi"]


def test_what_a_checkout_collects_stays_out_of_the_image():
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()]
    collected = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    unmatched = {name for name in collected if not any(Path(name).match(entry) for entry in ignored)}
    assert unmatched == set()


@pytest.mark.parametrize("stage", SERVING)
def test_the_compiler_and_the_library_that_serving_needs_are_installed(stage):
    assert {"g++", "libnuma1"} <= installed(stage)
