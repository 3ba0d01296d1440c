"""Embeddings and classes are made of the last token's hidden state, which the states of earlier chunks reach."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint
from support.engine import RECALL, engine, random_prompts
from support.oracle import Oracle

pytestmark = pytest.mark.engine

LABELS = 3
POOLING = {"runner": "pooling", "skip_tokenizer_init": False, "enable_prefix_caching": True}
CHUNKS = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([1, 40, 64, 65, 150, 300], 100, seed=31)


@pytest.fixture(scope="module")
def hidden(prompts):
    """Transformers' hidden state after each prompt's last token: ``[N, hidden]``."""
    model = Oracle(RECALL).model.model
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The recall checkpoint with a head of three classes: its folder and the head's weight."""
    config = json.loads((RECALL / "config.json").read_text())
    labels = {str(index): f"class {index}" for index in range(LABELS)}
    weight = torch.randn(LABELS, config["hidden_size"], generator=torch.manual_seed(0))
    tensors = load_file(RECALL / "model.safetensors") | {"score.weight": weight}
    folder = tmp_path_factory.mktemp("classifier") / "recall"
    return write_checkpoint(folder, config | {"id2label": labels}, tensors, tokenizer_from=RECALL), weight


def asked(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def test_embeddings_are_the_normalised_hidden_state(prompts, hidden):
    with engine(RECALL, convert="embed", **POOLING, **CHUNKS) as running:
        for _ in range(2):
            outputs = running.llm.embed(asked(prompts), use_tqdm=False)
            running.check_idle()
            found = torch.tensor([output.outputs.embedding for output in outputs])
            torch.testing.assert_close(found, torch.nn.functional.normalize(hidden), rtol=0, atol=1e-4)


def test_classes_are_a_softmax_over_the_head(classifier, prompts, hidden):
    folder, weight = classifier
    with engine(folder, convert="classify", **POOLING, **CHUNKS) as running:
        outputs = running.llm.classify(asked(prompts), use_tqdm=False)
        running.check_idle()
    found = torch.tensor([output.outputs.probs for output in outputs])
    torch.testing.assert_close(found, (hidden @ weight.T).softmax(-1), rtol=0, atol=1e-4)


def test_classes_by_tokens_of_the_vocabulary(prompts, hidden):
    overrides = {"classifier_from_token": ["3", "7"], "method": "no_post_processing"}
    with engine(RECALL, convert="classify", hf_overrides=overrides, **POOLING, **CHUNKS) as running:
        outputs = running.llm.classify(asked(prompts), use_tqdm=False)
        tokens = running.llm.get_tokenizer().convert_tokens_to_ids(["3", "7"])
    found = torch.tensor([output.outputs.probs for output in outputs])
    rows = load_file(RECALL / "model.safetensors")["lm_head.weight"][tokens]
    torch.testing.assert_close(found, (hidden @ rows.T).softmax(-1), rtol=0, atol=1e-4)


def test_a_head_that_the_checkpoint_lacks_is_missed():
    with pytest.raises(Exception, match=r"lacks tensors: score\.weight"), engine(RECALL, convert="classify", **POOLING):
        pass
