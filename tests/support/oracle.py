"""What transformers' own Kimi Linear says: the greedy token and the log-probability at every generated position."""

from pathlib import Path

import torch
from transformers import KimiLinearForCausalLM

from support.engine import Completion

LOGPROB_TOLERANCE = 1e-3


class Oracle:
    """transformers' model for one checkpoint, fp32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = KimiLinearForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each of `tokens`: ``[T, vocab]``."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)

    def check(self, completion: Completion) -> None:
        """Assert that greedy decoding would have given the same tokens, and that log-probabilities agree.

        One forward pass over prompt and answer suffices: if at every position the best token given what the engine
        wrote so far is what the engine wrote next, the two greedy sequences are the same.
        """
        logprobs = self.logprobs([*completion.prompt, *completion.tokens])[len(completion.prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == completion.tokens, f"prompt of {len(completion.prompt)} tokens"
        expected = logprobs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        difference = (expected - torch.tensor(completion.logprobs)).abs().max().item()
        assert difference <= LOGPROB_TOLERANCE, f"prompt of {len(completion.prompt)}: differs by {difference:.2e}"
