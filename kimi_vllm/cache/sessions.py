"""Sessions on disk: a request's pages and state, saved when it ends and loaded by a later one, after a restart too.

A connector of our own, because vLLM's take the ids of every cache group for blocks, and know nothing of slots. A
request says what it wants in ``kv_transfer_params``: ``{"save": NAME}``, ``{"load": NAME}``, or both. What is saved is
after all computed tokens, wherever in a block they end, and who loads it computes the tokens that follow. With
`session_prefix_tokens`, requests that name nothing save and load prefixes, at boundaries with a checkpoint.

This is the scheduler's half, with what vLLM's factory makes for both; the workers' is `session_worker.py`. Files are
read and written in threads, and the blocks concerned are held meanwhile. A load that fails is reported to vLLM, which
computes the prompt; a save that fails leaves no file. Either is told in the response, and in the log.
"""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from kimi_vllm.cache.manager import KDAStateManager, KDAStateSpec
from kimi_vllm.cache.prefix_files import PrefixFiles, prefix_tokens
from kimi_vllm.cache.prefix_policy import PrefixPolicy
from kimi_vllm.cache.session_files import digest, read_header, read_tokens
from kimi_vllm.cache.session_folder import (
    Promise,
    Session,
    SessionError,
    check_name,
    file_of,
    mark_used,
    promised,
    remove_scratch,
    sessions,
    trim,
)
from kimi_vllm.cache.session_worker import Job, Jobs, Report, SessionWorker
from kimi_vllm.cache.slots import NULL_SLOT
from kimi_vllm.geometry import geometry_of
from kimi_vllm.options import KimiOptions

logger = init_logger("vllm.kimi_vllm")

_ASK_EVERY_S = 0.02
"""Between two looks at what another process is writing, which may be over a network."""
_PATIENCE_S = 60.0
"""For which a request waits for another process."""

_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SessionConnector(SessionWorker, KVConnectorBase_V1, SupportsHMA):
    """Both halves; vLLM makes one for the scheduler and one for each worker.

    Attributes:
        counts: In the scheduler: sessions_resumed, _missed, _saved, _unsaved and _deleted so far, and `PrefixPolicy`'s.
        held: Checkpoints that are referenced because they are being written, by request.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = KimiOptions.of(vllm_config)
        assert options.session_dir is not None  # without, this is not configured
        self._folder, self._most = Path(options.session_dir), int(options.session_gib * 2**30)
        self._size: int = vllm_config.parallel_config.world_size
        self._block_size: int = vllm_config.cache_config.block_size
        groups = kv_cache_config.kv_cache_groups
        [self._states] = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, KDAStateSpec)]
        [self._pages] = [i for i in range(len(groups)) if i != self._states]
        self._manager: KDAStateManager
        self._planned = Jobs()
        self._matched: dict[str, list[int]] = {}
        # Requests whose prompt is computed, to the reason.
        self._missed: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        # Requests that ended, to the files that are being written; and what others are told of these.
        self._saving: dict[str, Path] = {}
        self._promises: dict[Path, Promise] = {}
        # Of these, who is saved from a checkpoint, to its slot.
        self.held: dict[str, KVCacheBlock] = {}
        self._sampled: dict[str, int] = {}
        # Requests whose sessions are being loaded, to their files.
        self._loading: dict[str, Path] = {}
        # Since when requests wait for another process to write a session, and what was last found of it.
        self._waiting: dict[str, float] = {}
        self._awaited: dict[Path, tuple[float, bool]] = {}
        self._unsaved: set[str] = set()
        self._tidying: Future[None] = Future()
        self.counts: Counter[str] = Counter()
        files = PrefixFiles(self._size, _engine(vllm_config))
        self._prefixes = PrefixPolicy(files, options.session_prefix_tokens, self.counts)
        if role == KVConnectorRole.SCHEDULER:
            if removed := remove_scratch(self._folder):
                logger.info("%d sessions were being saved when their process was killed: removed.", removed)
            self._tidy()
            self._tidying.set_result(None)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Learn who knows where states are."""
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        [self._manager] = [manager for manager in managers if isinstance(manager, KDAStateManager)]

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a request that loses its blocks as it ends is not saved."""
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens more than the prefix cache a session has; None while some process is writing it."""
        asked = _asked(request, "load")
        if request.request_id in self._missed:
            return 0, False
        if asked is None:
            return self._find_prefix(request, num_computed_tokens)
        try:
            _refuse(request)
            if request.skip_reading_prefix_cache:
                raise SessionError("the request reads no cached prefix, as with prompt_logprobs.")
            paths = self._ranks(check_name(asked), request)
            if self._awaits(paths, request.request_id):
                return None, False
            path = paths[0]
            tokens = self._match(path, request)
        except SessionError as error:
            self._missed[request.request_id] = str(error)
            self.counts["sessions_missed"] += 1
            logger.warning("Session %s: %s The prompt is computed.", _shown(request, "load"), error)
            return 0, False
        more = max(0, len(tokens) - num_computed_tokens)
        return more, more > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan a load into the blocks that were allocated for it."""
        if not num_external_tokens:
            return
        name, tokens = request.request_id, self._matched[request.request_id]
        asked = self._prefixes.found(name) or str(_asked(request, "load"))
        ids, first = blocks.get_block_ids(), (len(tokens) - num_external_tokens) // self._block_size
        self._loading[name] = self._ranks(asked, request)[0]
        self._planned.loads.append(
            Job(
                name,
                asked,
                request.cache_salt,
                digest(torch.tensor(tokens)),
                len(tokens),
                ids[self._states][(len(tokens) - 1) // self._block_size],
                ids[self._pages][: cdiv(len(tokens), self._block_size)],
                first,
            )
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Plan a save of a request that came to its end; its blocks are held until it is done.

        Returns:
            Whether they are, and what the response says of sessions.
        """
        name, told, errors = request.request_id, dict[str, Any](), list[str]()
        self._matched.pop(name, None)
        self._waiting.pop(name, None)
        if (missed := self._missed.pop(name, None)) is not None and _asked(request, "load") is not None:
            errors.append(f"Session {_shown(request, 'load')}: {missed} The prompt was computed.")
        if unknown := sorted({*(request.kv_transfer_params or ())} - {"load", "save"}):
            errors.append(f"kv_transfer_params: {', '.join(unknown)} is not known; load and save are.")
        if saves := _asked(request, "save") is not None and request.status in _ENDED:
            try:
                told = self._plan_save(request, block_ids)
            except SessionError as error:
                saves = False
                self.counts["sessions_unsaved"] += 1
                errors.append(f"Session {_shown(request, 'save')}: {error} It is not saved.")
                logger.warning("%s", errors[-1])
        elif request.status in _ENDED and block_ids[self._pages]:
            saves = self._plan_prefix(request, block_ids)
        if name not in self._loading:
            self._prefixes.ended(name)
        if errors:
            told["error"] = " ".join(errors)
        return saves, told or None

    def _plan_save(self, request: Any, block_ids: tuple[list[int], ...]) -> dict[str, Any]:
        _refuse(request)
        name, session = request.request_id, check_name(_asked(request, "save"))
        # Drafts may have counted beyond an answer's end: nobody folds their records.
        count = min(request.num_computed_tokens, request.num_tokens)
        if request.num_in_flight_tokens and self._sampled.get(name, 0) - 1 > count:
            # A step in flight has read the state, folded them all, and will write over it.
            count = self._manager.block_pool.last_kept(request, count)
            if not count:
                raise SessionError("it ended among the drafts of a step, and no earlier state of it is kept.")
            checkpoint = self.held[name] = self._manager.block_pool.hold_kept(request, count)
            slot = checkpoint.block_id
        else:
            # The slot may be in an entry behind these blocks: a window of drafts went on, or it was taken along.
            slot = self._manager.accessed_slots(name, count)[0] if block_ids[self._pages] else NULL_SLOT
        if slot == NULL_SLOT:
            raise SessionError("the request was preempted as it ended.")
        paths = self._save(request, session, count, slot, block_ids)
        if paths[0] in self._promises:
            self._promises[paths[0]].renew()
        else:
            self._promises[paths[0]] = Promise(paths)
        return {"save": session, "tokens": count}

    def _save(self, request: Any, name: str, count: int, slot: int, block_ids: tuple[list[int], ...]) -> list[Path]:
        pages, tokens = block_ids[self._pages][: cdiv(count, self._block_size)], request.all_token_ids[:count]
        values = torch.tensor(tokens)
        self._planned.saves.append(
            Job(request.request_id, name, request.cache_salt, digest(values), count, slot, pages, 0, values)
        )
        paths = self._ranks(name, request)
        self._saving[request.request_id] = paths[0]
        return paths

    def _plan_prefix(self, request: Any, block_ids: tuple[list[int], ...]) -> bool:
        pool = self._manager.block_pool
        chosen = self._prefixes.choose(request, partial(pool.last_kept, request))
        if chosen is None:
            return False
        name, count = chosen
        checkpoint = self.held[request.request_id] = pool.hold_kept(request, count)
        self._save(request, name, count, checkpoint.block_id, block_ids)
        return True

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        """What was planned since the last step."""
        planned, self._planned = self._planned, Jobs()
        return planned

    def update_connector_output(self, connector_output: Any) -> None:
        """Count what workers have done."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, Report):
            self._unsaved |= report.unsaved
            self._failed |= report.missed
        for name in connector_output.finished_sending or ():
            path = self._saving.pop(name)
            if (checkpoint := self.held.pop(name, None)) is not None:
                self._manager.block_pool.free_blocks([checkpoint])
            failed = name in self._unsaved
            self._unsaved.discard(name)
            if self._prefixes.leaves(name):
                self._prefixes.saved(name, failed=failed)
                continue
            if path not in self._saving.values():
                self._promises.pop(path).keep()
            self.counts["sessions_unsaved" if failed else "sessions_saved"] += 1
        if connector_output.finished_sending and self._most:
            self._tidy_soon()
        for name in connector_output.finished_recving or ():
            failed, path = name in connector_output.failed_recving, self._loading.pop(name)
            if not failed:
                mark_used(path)
            if self._prefixes.found(name) is not None:
                self._prefixes.loaded(name, failed=failed)
            else:
                self.counts["sessions_missed" if failed else "sessions_resumed"] += 1
            reason = self._failed.pop(name, "it could not be loaded.")
            if name not in self._matched:  # aborted meanwhile
                self._prefixes.ended(name)
            elif failed:
                self._missed[name] = reason

    def see(self, scheduler_output: Any, model_runner_output: Any, requests: Mapping[str, Any]) -> None:
        """Note how many tokens requests have with all that a step with drafts yields, those after an end too."""
        sampled, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        self._sampled = {
            name: requests[name].num_tokens + len(sampled[index[name]])
            for name in scheduler_output.scheduled_spec_decode_tokens
            if name in requests
        }

    def rest(self) -> None:
        """Sleep where a step has nothing to do: no request runs, and some wait for another process.

        vLLM makes a thousand empty steps a second then, which would take a core from that process.
        """
        if self._waiting and not (self._loading or self._saving):
            time.sleep(_ASK_EVERY_S)

    def shutdown(self) -> None:
        """Finish writing; workers have."""
        super().shutdown()
        for promise in self._promises.values():
            promise.keep()

    def _tidy_soon(self) -> None:
        """Have a thread do it, unless it is about to."""
        if self._tidying.running() or self._tidying.done():
            self._tidying = self._writer.submit(self._tidy)

    def _tidy(self) -> None:
        """Keep to the limit, and see which prefixes there are; in a thread once requests run."""
        if not self._most:
            return
        found, deleted = list[Session](), list[Session]()
        try:
            found = sessions(self._folder)
            deleted = trim(found, self._most)
        except OSError as error:  # of a folder that is read only, all the same what is there can be read
            logger.warning("kimi.session_dir cannot be kept within kimi.session_gib: %s.", error)
        if self._prefixes.look(found, deleted):
            logger.warning("Prefixes without a name are deleted as soon as they are saved. Increase kimi.session_gib.")
        self.counts["sessions_deleted"] += len(deleted)
        for session in deleted:
            logger.info("Session %s is deleted: the folder exceeds kimi.session_gib.", session.name)

    def _awaits(self, paths: list[Path], name: str) -> bool:
        """Whether a request waits for a session: one that is being written here, or for a while by another process."""
        path = paths[0]
        if path in self._saving.values():
            return True
        now = time.monotonic()
        asked, found = self._awaited.pop(path, (float("-inf"), False))
        if now - asked > _ASK_EVERY_S:
            asked, found = now, promised(paths)
        if not found:
            self._waiting.pop(name, None)
            return False
        self._awaited[path] = asked, found
        return now - self._waiting.setdefault(name, now) < _PATIENCE_S

    def _match(self, path: Path, request: Any) -> list[int]:
        """The tokens of a file, if they are the beginning of a request's."""
        if (tokens := self._matched.get(request.request_id)) is None:
            # Not more than that are read, whatever a file says of itself.
            if not 0 < read_header(path).num_tokens <= request.num_tokens:
                raise SessionError("its tokens are no prefix of the prompt.")
            tokens = read_tokens(path)
            count = len(tokens)
            if request.all_token_ids[:count] != tokens:
                raise SessionError("its tokens are no prefix of the prompt.")
            if count >= request.num_tokens:
                raise SessionError("its tokens are the whole prompt: the next token comes of one more.")
            self._matched[request.request_id] = tokens
        return tokens

    def _find_prefix(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As `get_num_new_matched_tokens`, of a file that the request has not named; None while another loads it."""
        if self._prefixes.due():
            self._tidy_soon()
        if (prefix := self._prefixes.find(request, num_computed_tokens)) is None:
            return 0, False
        path = self._ranks(prefix, request)[0]
        if path in self._loading.values():
            return None, False  # then it is in memory
        try:
            if len(self._match(path, request)) != prefix_tokens(prefix):
                raise SessionError("it has not as many tokens as its name says.")
        except SessionError as error:  # deleted meanwhile, most likely
            self._prefixes.loaded(request.request_id, failed=True)
            self._missed[request.request_id] = str(error)
            self._matched.pop(request.request_id, None)
            logger.warning("Session %s: %s The prompt is computed.", prefix, error)
            return 0, False
        return prefix_tokens(prefix) - num_computed_tokens, True

    def _ranks(self, name: str, request: Any) -> list[Path]:
        return [file_of(self._folder, name, request.cache_salt, rank, self._size) for rank in range(self._size)]


def _engine(vllm_config: Any) -> str:
    """What must be equal in engines that share prefixes, and is known without the model."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    of_model = model.model, model.revision, model.dtype, model.quantization, geometry_of(model).to_dict()
    of_cache = cache.cache_dtype, cache.block_size, KimiOptions.of(vllm_config).state_dtype
    return repr((of_model, of_cache, vllm_config.num_speculative_tokens, current_platform.device_type))


def _refuse(request: Any) -> None:
    """Raise SessionError for requests whose tokens do not say what their state is of."""
    if request.prompt_embeds is not None:
        raise SessionError("the prompt is given as embeddings, and a session is known by its tokens.")
    if request.resumable:
        raise SessionError("the prompt comes as a stream, which has not been tried.")


def _asked(request: Any, what: str) -> object:
    """The name that a request gives for saving or loading; None if it gives none."""
    return (request.kv_transfer_params or {}).get(what)


def _shown(request: Any, what: str) -> str:
    """That name for a message, which it cannot break into lines."""
    return ascii(str(_asked(request, what))[:128])[1:-1]
