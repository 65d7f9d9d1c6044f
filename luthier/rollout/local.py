"""The embedded engine: samples from the trainer's own weights, by the trainer's own forward pass.

Sequences wait in a queue, get a row of the cache when one is free, are read into it up to their last token, and are
drawn on the device for some steps at a time. Between two such chunks the host takes out what has ended and lets in what
waits; shapes stay what they are, so nothing is compiled again.

A row's numbers do not depend on the rows beside it, and its noise is a function of its seed and the step alone. So a
request gives the same completion whatever it shares a batch with, up to the rounding of differently sized programs.

Left out on purpose: text, but for stop texts; and threads: one thread calls everything.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier import processes
from luthier.config import EngineKeys
from luthier.errors import UserError
from luthier.model import cache, lora
from luthier.model.cache import Cache
from luthier.model.compute import Compute
from luthier.model.lora import Lora
from luthier.model.model import Model
from luthier.model.param import Param, Tree, map_spec
from luthier.rollout import checks, programs
from luthier.rollout.engine import Completion, Piece, Request, check_idle, drive
from luthier.rollout.plan import Limits, Size, bucket, buckets
from luthier.rollout.sampling import Settings
from luthier.rollout.sequence import Sequence as Drawing
from luthier.rollout.sequence import StopTexts
from luthier.rollout.slots import Placement, Slots

STOP_TOKENS = (8, 80)  # stop tokens of a sequence, filled up to one of these, or to a multiple of the last
NOTHING = Size(0, 0)


class Unread(NamedTuple):
    """Tokens of a prompt that are to be read into ``row`` after the ``start`` that it has, by an adapter's number."""

    row: int
    tokens_T: np.ndarray
    start: int
    adapter: int

    def after(self, count: int) -> Unread:
        """Return what is left when ``count`` of them are read."""
        return self._replace(tokens_T=self.tokens_T[count:], start=self.start + count)


class LocalEngine:
    """The engine in this process. To be called with its mesh in use (``mesh.use``)."""

    def __init__(
        self,
        model: Model,
        params: Tree,
        compute: Compute,
        mesh: Mesh,
        keys: EngineKeys,
        *,
        tokenizer: Any = None,
        context_length: int | None = None,
        seed: int = 0,
        version: int = 0,
        adapters: Sequence[str] = (),
        record_routes: bool = False,
    ) -> None:
        """Take a model; the cache is made when it is known what is wanted of it, or by ``reserve``.

        ``tokenizer`` finds stop texts; ``context_length`` is how many tokens the model was made for, None for any.
        ``version`` is that of the weights, as in ``sync``. ``adapters`` are the names of those in the weights, where
        they came from ``adapters.together``, in its order. With ``record_routes``, completions say to which experts
        their tokens were sent.

        Raises UserError where that is to be recorded of a model without experts.
        """
        if record_routes:
            checks.check_routes(model)
        dtype = compute.cached(keys.kv_cache_dtype)
        # A row's routes lie beside its keys: what is shared, copied or read anew has them with it.
        self._lines = {**model.cache_lines, **(model.routes_line if record_routes else {})}
        self.limits = Limits(keys, context_length, self._lines, dtype, mesh)
        self.tokenizer = tokenizer
        self._adapters = {name: number for number, name in enumerate(("", *adapters))}
        self._model, self._compute, self._keys, self._mesh, self._seed = model, compute, keys, mesh, seed
        self._queue: deque[Drawing] = deque()
        self._cancelled: list[Drawing] = []
        self._numbers = itertools.count()
        self._hold(NOTHING, {})
        self.sync(params, version)

    def sync(self, params: Tree, version: int = 0) -> None:
        """Sample from these weights from now on, sequences that are under way included.

        Those keep what older weights have read; each token is told the ``version`` that drew it. Matrices of another
        type than the engine computes in are cast, as each use of them in training casts them; all else is used where it
        lies, not copied.
        """
        params = _cast(params, self._model, self._compute.dtype)
        self._params, self._version = lora.settled(self._model.spec, params), version
        self.forget()

    def forget(self) -> None:
        """Forget what rows hold of ended sequences, so that what follows is sampled as by a new engine of this size.

        What is sampled from such a state is the same to the bit, as long as the requests and their order are.
        """
        self._slots.forget()

    @property
    def length(self) -> int | None:
        """The most tokens that prompt and completion have together."""
        return self._size.length or self.limits.length

    def reserve(self, sequences: int | None = None, length: int | None = None) -> Size:
        """Make the cache for this many sequences of this many tokens at a time, if it is not that large already.

        None stands for the most that keys, model and memory allow. Raises UserError where not even one sequence fits.
        """
        old = self._size
        if old.rows and self.busy:
            return old
        size = self.limits.grown(old, sequences, length)
        if size == old:
            return old
        self._hold(NOTHING, {})  # the old one is let go of, before the larger one is made
        stored = cache.make(self._lines, size.stored, size.length, self.limits.dtype, self._mesh)
        self._hold(size, stored)
        return size

    def _hold(self, size: Size, stored: Cache) -> None:
        """Take a cache and begin its record."""
        self._size, self._stored = size, stored
        ring = min(line.slots(size.length) for line in self._lines.values())
        self._slots: Slots[Drawing] = Slots.empty(size.rows, size.length, ring, size.keepers)
        # Rows that are split over devices stay where they are: all are worked on together.
        split = mesh_lib.batch_shards(self._mesh) > 1
        self._row_buckets = (size.rows,) if split else buckets(size.rows)

    def warm_up(self, *, longest: int | None = None, logprobs: bool = False) -> None:
        """Compile all that sampling takes, for a cache of the size reserved, so that no request waits for it.

        ``longest`` is the length of the longest prompt, where it is known. What reports likeliest tokens is compiled
        with ``logprobs`` alone, else when it is first asked for.
        """
        if not self._size.rows:
            self.reserve()
        most = self._keys.prefill_chunk_length if longest is None else longest
        for length in (length for length in self._prompt_buckets if length < 2 * most):
            for together in buckets(self._together(length)):
                self._prefill([], length, together)
        self._copy([(0, 0)])
        self._routes(0)
        for rows in self._row_buckets:
            for alternatives in (0, checks.MOST_ALTERNATIVES) if logprobs else (0,):
                self._run_decode(self._rows(rows, []), alternatives)
        jax.block_until_ready(self._stored)

    def check(self, request: Request) -> None:
        """Raise UserError where a request cannot be served."""
        checks.check(
            request, self._model.config.vocab_size, self.limits.length, self.tokenizer is not None, self._adapters
        )

    def generate(
        self, requests: Sequence[Request], on_piece: Callable[[Piece], None] | None = None
    ) -> Iterator[Completion]:
        """Yield each completion as it is finished; see ``engine.Engine``."""
        for request in requests:
            self.check(request)
        check_idle(self)
        if requests:
            longest = max(len(each.prompt) + each.sampling.max_new_tokens for each in requests)
            self.reserve(sum(request.samples for request in requests), min(longest, self.limits.length or longest))
        return drive(self, requests, on_piece)

    def submit(self, request: Request, *, first: bool = False) -> int:
        """Let a request wait for its turn, or with ``first`` go before all that wait, and return its number.

        Its completions end where the cache does: ``reserve`` makes it as long as is needed.
        Raises UserError where it cannot be served.
        """
        self.check(request)
        size = self._size if self._size.rows else self.reserve()
        if len(request.prompt) >= size.length:
            size = self.reserve()
        if len(request.prompt) >= size.length:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, and the cache was made for {size.length}. Set "
                "max_target_length to as many as are needed (and kv_cache_gib to the memory for them)."
            )
        number, sampling = next(self._numbers), request.sampling
        # Reproducible where the request has a seed; else by the engine's seed and all that it was asked before. Each
        # number takes two words, so that no two lists of them make the same sequence.
        named = [0, self._seed, number] if sampling.seed is None else [1, sampling.seed]
        words = [word for value in named for word in (value % 2**32, value >> 32)]
        prompt_T = np.asarray(request.prompt, np.int32)
        drawings, adapter = [], self._adapters[request.adapter]
        for sample in range(request.samples):
            key_2 = np.random.SeedSequence([sample, *words]).generate_state(2)
            watch = StopTexts(self.tokenizer, sampling.stop) if sampling.stop else None
            limit = min(sampling.max_new_tokens, size.length - len(prompt_T))
            drawings.append(Drawing(number, sample, prompt_T, sampling, limit, key_2, adapter, watch))
        if first:
            self._queue.extendleft(reversed(drawings))
        else:
            self._queue.extend(drawings)
        return number

    def cancel(self, number: int) -> None:
        """End a request; what there is of its completions comes out of the next ``step``."""
        self._cancelled += [drawing for drawing in self._queue if drawing.request == number]
        self._queue = deque(drawing for drawing in self._queue if drawing.request != number)
        for row, drawing in self._slots:
            if drawing.request == number:
                self._slots.sequences[row] = None
                self._cancelled.append(drawing)

    @property
    def busy(self) -> bool:
        """Whether anything waits, is drawn, or was cancelled and not reported yet."""
        return bool(self._queue or self._cancelled or self._slots.busy)

    def step(self) -> list[Piece | Completion]:
        """Let in what waits, draw one chunk, and return its pieces and then what came to its end.

        Where that fails, all that is under way or waits is cancelled, and the next requests begin anew.
        """
        unfinished = [*self._cancelled, *(drawing for _, drawing in self._slots), *self._queue]
        try:
            pieces, ended = self._advance()
        except BaseException:
            self._abandon(unfinished)
            raise
        cancelled = [drawing.completion() for drawing in self._cancelled]
        self._cancelled.clear()
        return [*pieces, *cancelled, *ended]

    def _advance(self) -> tuple[list[Piece], list[Completion]]:
        self._admit()
        pieces, ended = [], []
        for row, drawing, piece in self._decode() if self._slots.busy else ():
            pieces.append(piece)
            if drawing.finish is not None:
                self._slots.sequences[row] = None
                ended.append(drawing.completion(self._routes(row, drawing.read)))
        return pieces, ended

    def _abandon(self, unfinished: list[Drawing]) -> None:
        """Cancel everything, and hold nothing that rows have for read: it is not known what was done in them."""
        self._cancelled = unfinished
        self._queue.clear()
        self._slots.sequences[:] = [None] * self._size.rows
        self._slots.held_R[:] = -1
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._stored)):  # a program that failed had taken it over
            self._hold(NOTHING, {})

    def _admit(self) -> None:
        """Give free rows to what waits longest, and read the prompts into them."""
        free = len(self._slots.free)
        let_in = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
        let_in.sort(key=lambda drawing: drawing.sample > 0)  # first the prompts that samples copy from
        self._place(let_in)
        if let_in and self._queue:  # samples of a prompt that was read just now, perhaps
            waiting = self._queue[0]
            longest = len(waiting.prompt_T) - 1 + waiting.limit
            pair = self._slots.keep(waiting.prompt_T[:-1], longest, waiting.adapter)
            self._copy([pair] if pair else [])

    def _place(self, let_in: list[Drawing]) -> None:
        """Give sequences their rows, and read in waves: what copies from a row waits until that is read."""
        wave: list[tuple[Placement, Drawing]] = []
        for drawing in let_in:
            unread = [other.row for other, _ in wave]
            placement = self._slots.place(drawing, drawing.prompt_T[:-1], drawing.adapter, unread)
            if placement.source in unread:
                self._read(wave)
                wave = []
            wave.append((placement, drawing))
        self._read(wave)

    def _read(self, wave: list[tuple[Placement, Drawing]]) -> None:
        """Bring prompts into their rows, but for their last token, which is the first that is decoded."""
        self._copy([(place.source, place.row) for place, _ in wave if place.source != place.row])
        left = [
            Unread(place.row, drawing.prompt_T[place.kept : -1], place.kept, drawing.adapter) for place, drawing in wave
        ]
        left = [item for item in left if len(item.tokens_T)]
        while left:
            left.sort(key=lambda item: len(item.tokens_T), reverse=True)
            length = self._prompt_bucket(left[0].tokens_T)
            together = self._together(length)
            alike = [item for item in left if self._prompt_bucket(item.tokens_T) == length][:together]
            if len(alike) == 2:  # one after the other is sooner done than padded to more
                alike = alike[:1]
            self._prefill(alike, length, bucket(buckets(together), len(alike)))
            done = {item.row for item in alike}
            left = [item for item in left if item.row not in done]
            left += [item.after(length) for item in alike if len(item.tokens_T) > length]

    @property
    def _prompt_buckets(self) -> tuple[int, ...]:
        """The lengths that prompts are read in: powers of two up to a whole chunk."""
        most = self._keys.prefill_chunk_length
        return (*itertools.takewhile(lambda length: length < most, (16 << i for i in itertools.count())), most)

    def _prompt_bucket(self, tokens_T: np.ndarray) -> int:
        return bucket(self._prompt_buckets, min(self._prompt_buckets[-1], len(tokens_T)))

    def _together(self, length: int) -> int:
        """Return how many prompts of a length are read at a time."""
        return min(self._keys.prefill_chunk_length // length, self._size.rows)

    def _prefill(self, items: list[Unread], length: int, together: int) -> None:
        tokens_PT = np.zeros((together, length), np.int32)
        rows_P, lengths_P, counts_P, adapters_P = (np.zeros(together, np.int32) for _ in range(4))
        for p, item in enumerate(items):
            count = min(length, len(item.tokens_T))
            tokens_PT[p, :count] = item.tokens_T[:count]
            rows_P[p], lengths_P[p], counts_P[p], adapters_P[p] = item.row, item.start, count, item.adapter
        arrays = (tokens_PT, rows_P, lengths_P, counts_P, adapters_P)
        self._stored = programs.prefill(self._params, self._stored, *arrays, model=self._model, compute=self._compute)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            sources_P, targets_P = np.zeros((2, self._size.rows), np.int32)
            sources_P[: len(pairs)], targets_P[: len(pairs)] = zip(*pairs, strict=True)
            self._stored = programs.copy(self._stored, sources_P, targets_P, len(pairs))

    def _routes(self, row: int, count: int = 0) -> np.ndarray | None:
        """Return where the first ``count`` tokens of a row were sent, None where that is not recorded."""
        if cache.ROUTES not in self._stored:
            return None
        return processes.fetch(programs.routes(self._stored, np.int32(row)))[:count].copy()  # the rest is let go of

    def _compact(self) -> int:
        """Bring the sequences into the fewest rows that a program works on, and return how many those are."""
        busy = self._slots.busy
        size = bucket(self._row_buckets, len(busy))
        free = [row for row in self._slots.free if row < size]
        moves = list(zip([row for row in busy if row >= size], free, strict=False))
        self._copy(moves)
        for source, target in moves:
            self._slots.move(source, target)
        return size

    def _decode(self) -> list[tuple[int, Drawing, Piece]]:
        """Draw a chunk and return (row, sequence, its new piece) for each sequence."""
        size = self._compact()
        under_way = list(self._slots)
        rows = self._rows(size, under_way)
        asked = any(drawing.sampling.logprobs for _, drawing in under_way)
        after, chunk = self._run_decode(rows, checks.MOST_ALTERNATIVES if asked else 0)
        columns = (chunk.logp_BS, chunk.softmax_logp_BS, chunk.alternative_ids_BSA, chunk.alternative_logp_BSA)
        taken = []
        for row, drawing in under_way:
            count = after.drawn_B[row] - rows.drawn_B[row]
            last = drawing.last_token
            tokens_T, row_columns = chunk.tokens_BS[row, :count], [column[row, :count] for column in columns]
            self._slots.append(row, np.asarray([last, *tokens_T[:-1]], np.int32))
            piece = drawing.take(tokens_T, row_columns, not after.live_B[row], self._version)
            taken.append((row, drawing, piece))
        return taken

    def _run_decode(self, rows: programs.Rows, alternatives: int) -> tuple[programs.Rows, programs.Chunk]:
        self._stored, after, chunk = programs.decode(
            self._params,
            self._stored,
            rows,
            bool(self._queue),
            model=self._model,
            compute=self._compute,
            steps=self._keys.decode_steps,
            alternatives=alternatives,
        )
        return processes.fetch((after, chunk))

    def _rows(self, size: int, under_way: list[tuple[int, Drawing]]) -> programs.Rows:
        """Return the state of the first ``size`` rows as arrays."""
        stops = max((len(drawing.sampling.stop_token_ids) for _, drawing in under_way), default=0)
        width = next((width for width in STOP_TOKENS if width >= stops), -(-stops // STOP_TOKENS[-1]) * STOP_TOKENS[-1])
        tokens_B, lengths_B, drawn_B, limits_B, adapters_B, top_k_B = (np.zeros(size, np.int32) for _ in range(6))
        temperature_B, top_p_B, min_p_B = np.ones((3, size), np.float32)
        live_B, key_B2 = np.zeros(size, bool), np.zeros((size, 2), np.uint32)
        stops_BE = np.full((size, width), programs.NO_TOKEN, np.int32)
        for row, drawing in under_way:
            how, live_B[row] = drawing.sampling, True
            tokens_B[row], drawn_B[row], limits_B[row] = drawing.last_token, drawing.drawn, drawing.limit
            lengths_B[row], adapters_B[row] = drawing.read, drawing.adapter
            temperature_B[row], top_k_B[row], top_p_B[row], min_p_B[row] = (
                how.temperature,
                how.top_k,
                how.top_p,
                how.min_p,
            )
            key_B2[row] = drawing.key_2
            stops_BE[row, : len(how.stop_token_ids)] = how.stop_token_ids
        settings = Settings(temperature_B, top_k_B, top_p_B, min_p_B, key_B2)
        return programs.Rows(tokens_B, lengths_B, drawn_B, limits_B, live_B, stops_BE, adapters_B, settings)


def _cast(params: Tree, model: Model, dtype: Any) -> Tree:
    """Return the weights with matrices in ``dtype``: vectors and routers are computed with as they are.

    So are adapters, which each use casts as in training, and what is quantised.
    """

    def cast(declared: Param, weight: Any) -> Any:
        if isinstance(weight, Lora):
            return replace(weight, base=cast(declared, weight.base))
        if not isinstance(weight, jax.Array):
            return weight
        return weight.astype(dtype) if declared.multiplies and weight.dtype != dtype else weight

    return map_spec(cast, model.spec, params)
