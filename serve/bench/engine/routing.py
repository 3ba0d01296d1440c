"""How many experts a step reads, and router biases that spread tokens over all of them, as training does.

With random weights some experts can be chosen more often than others, and a step that reads fewer of them is faster:
two engines are compared where both read as many. Biases are balanced as in arXiv:2408.15664: an expert's goes down
while more tokens than its share choose it. Routers run outside of CUDA graphs meanwhile. Functions take vLLM's worker
first.
"""

from typing import Any

import torch
from torch import Tensor

RATES = tuple(0.02 * 0.93**step for step in range(60))
"""By how much a bias changes in a step for an expert with twice its share."""

_balance: "_Balance | None" = None


class _Balance:
    """Routers of a model, wrapped.

    Attributes:
        read: Of each step and layer so far, how many experts its tokens chose.
    """

    def __init__(self, runner: Any) -> None:
        self.read: list[Tensor] = []
        self.rate = 0.0
        self._manager, self._routers = runner.cudagraph_manager, _routers(runner.get_model())
        for router in self._routers:
            router._compute_routing = self._wrapped(router, router._compute_routing)
        self._manager._graphs_captured = False

    def stop(self) -> None:
        """Let routers go, and steps be replayed."""
        for router in self._routers:
            del router._compute_routing
        self._manager._graphs_captured = True

    @property
    def layers(self) -> int:
        """Of experts."""
        return len(self._routers)

    def _wrapped(self, router: Any, choose: Any) -> Any:
        def chosen(*args: Any, **named: Any) -> Any:
            weights, ids = choose(*args, **named)
            bias = router.e_score_correction_bias
            counts = torch.zeros_like(bias, dtype=torch.float32)
            counts.scatter_add_(0, ids.flatten().long(), counts.new_ones(ids.numel()))
            self.read.append((counts > 0).sum())
            if self.rate:
                bias -= (self.rate * (counts / counts.mean() - 1)).to(bias.dtype)
            return weights, ids

        return chosen


def _routers(model: Any) -> list[Any]:
    found = [getattr(module, "router", None) for module in model.modules()]
    return [router for router in found if getattr(router, "e_score_correction_bias", None) is not None]


def start(worker: Any) -> int:
    """Watch the routers from now on; return how many layers have one.

    Raises:
        RuntimeError: Not with vLLM's first model runner.
    """
    global _balance
    if getattr(worker.model_runner, "cudagraph_manager", None) is None:
        raise RuntimeError("routers are watched in vLLM's second model runner, with CUDA graphs, only")
    _balance = _Balance(worker.model_runner)
    return _balance.layers


def balance(worker: Any, rate: float) -> None:
    """From now on change biases at this rate."""
    assert _balance is not None
    _balance.rate = rate


def stop(worker: Any) -> list[float]:
    """Return of each step since `start` how many experts a layer read, on average."""
    assert _balance is not None
    _balance.stop()
    read = torch.stack(_balance.read).view(-1, _balance.layers).float().mean(1)
    return [round(value, 2) for value in read.tolist()]
