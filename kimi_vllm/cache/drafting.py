"""When steps go without drafts: while so few are accepted that verifying them may cost more than they yield."""

REST = 64
"""Steps without drafts before some are tried again."""
TRIED = 16
"""Drafts whose results end a trial."""
KNOWN = 64
"""Drafts whose results must be known before steps go without."""
HALF_LIFE = 256
"""Drafts after which a result counts half."""


def both_lengths(max_num_seqs: int, drafts: int) -> list[tuple[int, int, int]]:
    """Return a schedule by batch size for whose sake vLLM captures CUDA graphs with drafts and without, of any batch.

    Which steps draft is up to `Drafting`: the sizes mean nothing. The format is that of
    `num_speculative_tokens_per_batch_size` in vLLM's `SpeculativeConfig`.
    """
    return [(1, 1, 0), (2, max(2, max_num_seqs), drafts)]


class Drafting:
    """Follows which share of drafts is accepted, of all requests together, and decides once a step.

    vLLM schedules as many drafts for each request of a step, because its CUDA graphs are for requests of one length.
    """

    def __init__(self, least: float) -> None:
        """Begin with drafts.

        Args:
            least: The share of accepted drafts below which steps go without; 0: never.
        """
        self._least = least
        self._rests, self._rested = False, 0
        self._seen = self._accepted = 0.0  # counted less with time
        self._new_seen = self._new_accepted = 0

    def wanted(self, can_draft: bool) -> bool:
        """Return whether the next step is to draft.

        Args:
            can_draft: Whether any of its requests could; if not, the step counts as neither a rest nor a trial.
        """
        self._settle()
        tried = self._rested > REST
        if self._rests and can_draft and not tried:
            self._rested += 1
            if tried := self._rested > REST:
                self._seen = self._accepted = 0.0
        return not self._rests or tried

    def saw(self, drafts: int, accepted: int) -> None:
        """Take in how many of a request's drafts were accepted in a step, some steps after it was scheduled."""
        self._new_seen += drafts
        self._new_accepted += accepted

    def _settle(self) -> None:
        """Decide by the results that have come since the last step: of all its requests, in whatever order."""
        if not self._new_seen:
            return
        keep = 0.5 ** (self._new_seen / HALF_LIFE)
        self._seen, self._accepted = keep * self._seen + self._new_seen, keep * self._accepted + self._new_accepted
        self._new_seen = self._new_accepted = 0
        if self._rests and self._rested <= REST:
            return  # of steps before the rest
        if self._seen >= (TRIED if self._rests else KNOWN):
            self._rests, self._rested = self._accepted < self._least * self._seen, 0
