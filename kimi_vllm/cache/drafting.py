"""When steps go without drafts: while so few are accepted that verifying them costs more than they yield."""

REST = 64
"""Steps without drafts before some are tried again."""
TRIED = 16
"""Drafts that are tried, in as few steps as they take."""
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
    """Follows which share of drafts is accepted, of all requests together.

    vLLM schedules as many drafts for each request of a step, because its CUDA graphs are for requests of one length.
    """

    def __init__(self, least: float, drafts: int) -> None:
        """Begin with drafts.

        Args:
            least: The share of accepted drafts below which steps go without; 0: never.
            drafts: Drafts of a request.
        """
        self._least, self._drafts = least, drafts
        self._drafting, self._rested = True, 0
        self._seen, self._accepted = 0.0, 0.0

    def wanted(self, requests: int) -> bool:
        """Return whether the next step, of so many requests, is to draft."""
        if self._drafting:
            return True
        self._rested += 1
        if self._rested <= REST:
            return False
        if self._rested >= REST + -(-TRIED // (self._drafts * requests)):
            self._rested = 0
        return True

    def saw(self, drafts: int, accepted: int) -> None:
        """Take in how many of a request's drafts were accepted in a step, some steps after it was scheduled."""
        keep = 0.5 ** (drafts / HALF_LIFE)
        self._seen, self._accepted = keep * self._seen + drafts, keep * self._accepted + accepted
        if self._seen < (KNOWN if self._drafting else TRIED):
            return
        enough = self._accepted >= self._least * self._seen
        if enough != self._drafting:
            self._drafting, self._rested = enough, 0
        if not enough:
            self._seen = self._accepted = 0.0
