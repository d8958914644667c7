"""What the soak runs, and the process that runs it: threads that draw a kind of call, run it and compare the bits.

As a program: the folder with the models, and the numbers of threads and of CPUs' worth of time. It prints a line of
JSON every few seconds and stops when its standard input ends.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import DecoderSession
from sparamx_onnx.models import tinylm
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_ATTENTION
from sparamx_onnx.ops.packed_cache import CacheLayout, CacheOptions
from sparamx_onnx.ops.reference_attention import AttentionOptions, sparse_amx_attention
from sparamx_onnx.ops.reference_packed_cache import packed_attention

Arrays = list[npt.NDArray[Any]]

EXPECTED = "expected.json"
REPORT_SECONDS = 2.0
# A session is closed and opened anew after about so many runs.
RUNS_OF_A_SESSION = 30
MOST_THREADS = 3
MOST_ERRORS = 20

# K of three products with the same input, and of one behind them; neither is a multiple of a tile.
K, WIDTHS, LAST = 777, (512, 256, 130), 333
ROWS = (1, 5, 40)
# How far weights of a type may take a result, relative to its largest number. The soak is about equal bits: this only
# says that what is compared with makes sense.
NEAR = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2, "int4": 0.3}
DECODERS = {"bf16": "fast", "int8": "packed", "int4": "packed"}
DECODER_NEAR = {"bf16": 0.05, "int8": 0.1, "int4": 0.3}
ATTENTION_NEAR = 1e-4


class Kind(Protocol):
    """A call that always gives the same."""

    @property
    def name(self) -> str:
        """Of the kind, among all."""

    @property
    def shared(self) -> bool:
        """Whether threads may use one session at the same time."""

    @property
    def near(self) -> float:
        """How far the reference may be, relative to its largest number."""

    def open(self, threads: int) -> Any:
        """A session."""

    def run(self, session: Any) -> Arrays:
        """What the call gives."""

    def reference(self) -> Arrays:
        """About the same, computed in another way."""


def prepare(chosen: Sequence[Kind]) -> None:
    """Writes the models of these kinds."""
    texts = [kind for kind in chosen if isinstance(kind, Text)]
    if texts:
        decoder = tinylm.export(texts[0].model.parent)
        for path, weights, attention in [
            *((kind.model, kind.weights, DECODERS[kind.weights]) for kind in texts),
            (texts[0].reference_model, "fp32", "keep"),
        ]:
            sparamx_onnx.convert(decoder, path, method="magnitude", weights=weights, attention=attention)
    for kind in chosen:
        if isinstance(kind, Product):
            kind.write()
        elif isinstance(kind, Conversation):
            kind.model.write_bytes(kind.node().SerializeToString())


def kinds(folder: Path) -> list[Kind]:
    """All calls of the soak."""
    products: list[Kind] = [
        Product(folder / f"{weights}-{'half' if half else 'float'}.onnx", weights, half, rows)
        for weights in NEAR
        for half in (False, True)
        for rows in ROWS
    ]
    conversations: list[Kind] = [
        Conversation(folder / f"{'packed' if packed else 'fast'}.onnx", packed, one_buffer)
        for packed in (False, True)
        for one_buffer in (False, True)
    ]
    return [*products, *conversations, *(Text(folder / "tinylm" / f"{w}.onnx", w) for w in DECODERS)]


def digest(arrays: Sequence[npt.NDArray[Any]]) -> str:
    """Of types, shapes and all bits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape} ".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return sparamx_onnx.InferenceSession(path, options)


@dataclass(frozen=True)
class Product:
    """A converted model: three layers with one input, which become one operator with three outputs, and one behind."""

    model: Path
    weights: str
    half: bool  # activations in fp16
    rows: int
    shared: bool = True

    @property
    def name(self) -> str:
        """Weights, type of the activations, rows."""
        return f"product {self.weights} {'fp16' if self.half else 'fp32'} {self.rows}"

    @property
    def near(self) -> float:
        """Results in fp16 have 11 bits."""
        return max(NEAR[self.weights], 1e-2 if self.half else 0.0)

    @property
    def _dense(self) -> Path:
        return self.model.with_suffix(".dense.onnx")

    def write(self) -> None:
        """Writes the dense model and converts it."""
        if self.model.exists():
            return
        rng = np.random.default_rng(len(str(self.weights)))
        dtype = np.float16 if self.half else np.float32
        onnx_type = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        sizes = [(K, n) for n in WIDTHS] + [(WIDTHS[0], LAST)]
        values, nodes = [], []
        for index, (k, n) in enumerate(sizes):
            weight = rng.standard_normal((k, n)) / np.sqrt(k)
            weight[rng.random((k, n)) < 0.5] = 0
            values += [(f"w{index}", weight), (f"b{index}", rng.standard_normal(n))]
            x = "x" if index < len(WIDTHS) else "y0"
            nodes.append(helper.make_node("MatMul", [x, f"w{index}"], [f"p{index}"]))
            nodes.append(helper.make_node("Add", [f"p{index}", f"b{index}"], [f"s{index}"]))
            nodes.append(helper.make_node(("Gelu", "Relu", "Identity", "Relu")[index], [f"s{index}"], [f"y{index}"]))
        graph = helper.make_graph(
            nodes,
            "products",
            [helper.make_tensor_value_info("x", onnx_type, ["rows", K])],
            [helper.make_tensor_value_info(f"y{i}", onnx_type, ["rows", n]) for i, (_, n) in enumerate(sizes)],
            [numpy_helper.from_array(value.astype(dtype), name) for name, value in values],
        )
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        onnx.save(model, self._dense)
        sparamx_onnx.convert(self._dense, self.model, weights=self.weights, method="keep", fuse_siblings="always")
        made = onnx.load(self.model, load_external_data=False).graph.node
        assert sorted(len(node.output) for node in made if node.domain == DOMAIN) == [1, 3]

    @property
    def _feeds(self) -> dict[str, npt.NDArray[Any]]:
        x = np.random.default_rng(self.rows).standard_normal((self.rows, K), np.float32)
        return {"x": x.astype(np.float16) if self.half else x}

    def open(self, threads: int) -> onnxruntime.InferenceSession:
        """A session over the converted model's mapped weights."""
        return _session(self.model, threads)

    def run(self, session: onnxruntime.InferenceSession) -> Arrays:
        """All four outputs."""
        return list(session.run(None, self._feeds))

    def reference(self) -> Arrays:
        """The dense model's."""
        return self.run(_session(self._dense, 1))


@dataclass(frozen=True)
class Conversation:
    """Three calls of attention, each over the cache that the last one left."""

    model: Path
    packed: bool
    one_buffer: bool  # for past and present
    shared: bool = True
    near: float = ATTENTION_NEAR

    _OPTIONS = AttentionOptions(num_heads=6, kv_num_heads=2)
    _PRUNING = CacheOptions(k_sparsity=0.3, v_sparsity=0.5, sink=64, recent=64)
    _SIZE = 64
    _CAPACITY = 400
    _PROMPTS = (250, 180)
    _STEPS = (1, 40)

    @property
    def name(self) -> str:
        """Kind of cache and of its memory."""
        return f"attention {self.model.stem} {'one buffer' if self.one_buffer else 'growing'}"

    def _caches(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the past that comes first."""
        batch, heads, tokens = len(self._PROMPTS), self._OPTIONS.kv_num_heads, self._CAPACITY * self.one_buffer
        if self.packed:
            layout = CacheLayout(self._PRUNING, self._SIZE, self._SIZE)
            return {"past_cache": (batch, heads, layout.row_bytes(tokens) if tokens else 0)}
        return dict.fromkeys(("past_key", "past_value"), (batch, heads, tokens, self._SIZE))

    def node(self) -> onnx.ModelProto:
        """A model of one node."""
        types = {"past_cache": TensorProto.UINT8, "seqlens_k": TensorProto.INT32}
        types["total_sequence_length"] = TensorProto.INT32
        roles = [*self._caches(), "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        outputs = ["output", *(["", "", "present_cache"] if self.packed else ["present_key", "present_value"])]
        ranks = {name: len(shape) for name, shape in self._caches().items()}
        ranks |= {"query": 3, "seqlens_k": 1, "total_sequence_length": 0, "cos_cache": 2, "sin_cache": 2}
        attributes: dict[str, Any] = {"num_heads": self._OPTIONS.num_heads, "kv_num_heads": self._OPTIONS.kv_num_heads}
        if self.packed:
            attributes |= {"cache": "packed", **vars(self._PRUNING)}
        node = helper.make_node(
            SPARSE_AMX_ATTENTION.name, ["query", *roles], outputs, domain=DOMAIN, roles=",".join(roles), **attributes
        )
        graph = helper.make_graph(
            [node],
            "attention",
            [
                helper.make_tensor_value_info(
                    name, types.get(name, TensorProto.FLOAT), [f"{name}{axis}" for axis in range(ranks[name])]
                )
                for name in ("query", *roles)
            ],
            [
                helper.make_tensor_value_info(name, types.get(name.replace("present", "past"), TensorProto.FLOAT), None)
                for name in outputs
                if name
            ],
        )
        imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
        return helper.make_model(graph, ir_version=10, opset_imports=imports)

    def _calls(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """What each call is fed, but for the cache."""
        rng = np.random.default_rng(0)
        angles = np.arange(self._CAPACITY)[:, None] * 1000.0 ** -np.linspace(0, 1, self._SIZE // 2)
        width = (self._OPTIONS.num_heads + 2 * self._OPTIONS.kv_num_heads) * self._SIZE
        lengths = np.array(self._PROMPTS)
        for tokens in (max(self._PROMPTS), *self._STEPS):
            yield {
                "query": rng.standard_normal((len(lengths), tokens, width), np.float32),
                "seqlens_k": (lengths - 1).astype(np.int32),
                "total_sequence_length": np.array(lengths.max(), np.int32),
                "cos_cache": np.cos(angles).astype(np.float32),
                "sin_cache": np.sin(angles).astype(np.float32),
            }
            # What comes next is as long for every entry.
            lengths = lengths + self._STEPS[min(tokens != max(self._PROMPTS), len(self._STEPS) - 1)]

    def open(self, threads: int) -> onnxruntime.InferenceSession:
        """A session of one node."""
        return _session(self.model, threads)

    def run(self, session: onnxruntime.InferenceSession) -> Arrays:
        """The outputs of all calls."""
        dtype = np.uint8 if self.packed else np.float32
        past = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            for name, shape in self._caches().items()
        }
        outputs = []
        for feeds in self._calls():
            binding = session.io_binding()
            binding.bind_output("output")
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
                present = name.replace("past", "present")
                if self.one_buffer:
                    binding.bind_ortvalue_output(present, value)
                else:
                    binding.bind_output(present)
            session.run_with_iobinding(binding)
            output, *presents = binding.get_outputs()
            outputs.append(output.numpy().copy())
            if not self.one_buffer:  # the values made here own the one buffer; those that a binding returns do not
                past = dict(zip(past, presents, strict=True))
        return outputs

    def reference(self) -> Arrays:
        """NumPy's."""
        past: dict[str, Any] = {
            name: np.zeros(shape, np.uint8 if self.packed else np.float32) for name, shape in self._caches().items()
        }
        outputs: Arrays = []
        for feeds in self._calls():
            inputs: dict[str, Any] = {**feeds, "total_sequence_length": int(feeds["total_sequence_length"])}
            if self.packed:
                packed = packed_attention(self._OPTIONS, self._PRUNING, **inputs, **past)
                past = {"past_cache": packed.present_cache}
                outputs.append(packed.output)
            else:
                result = sparse_amx_attention(self._OPTIONS, **inputs, **past)
                past = {"past_key": result.present_key, "past_value": result.present_value}
                outputs.append(result.output)
        return outputs


@functools.cache
def _text() -> npt.NDArray[np.int64]:
    return tinylm.held_out()


@dataclass(frozen=True)
class Text:
    """The trained decoder reads two prompts and more tokens one by one, with a cache of its own."""

    model: Path
    weights: str
    shared: bool = False

    _PROMPTS = (150, 90)
    _STEPS = 12

    @property
    def name(self) -> str:
        """Weights and attention."""
        return f"decoder {self.weights} {DECODERS[self.weights]}"

    @property
    def near(self) -> float:
        """A packed cache is pruned."""
        return DECODER_NEAR[self.weights]

    @property
    def reference_model(self) -> Path:
        """That of all of them."""
        return self.model.with_name("fp32.onnx")

    def open(self, threads: int) -> DecoderSession:
        """A session with room for all tokens."""
        return DecoderSession(self.model, capacity=256, threads=threads)

    def run(self, session: DecoderSession) -> Arrays:
        """Logits after the prompts and after every further token."""
        text = _text()
        logits = [session.prefill([text[:length].tolist() for length in self._PROMPTS])]
        logits += [session.step(text[200 + i : 400 + i : 100]) for i in range(self._STEPS)]
        return logits

    def reference(self) -> Arrays:
        """The same weights in fp32, and ONNX Runtime's own attention."""
        return self.run(DecoderSession(self.reference_model, capacity=256, threads=1))


@dataclass
class Sessions:
    """The open sessions of a kind: one for all threads, or idle ones of which a thread takes one for itself."""

    kind: Kind
    opened: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _idle: list[Any] = field(default_factory=list)

    def take(self, rng: random.Random) -> Any:
        """A session to run with; a new one now and then."""
        with self._lock:
            if rng.randrange(RUNS_OF_A_SESSION) == 0:
                self._idle.clear()  # closes it when the last thread that uses it is done
            if self._idle:
                return self._idle[-1] if self.kind.shared else self._idle.pop()
            self.opened += 1
            session = self.kind.open(rng.randint(1, MOST_THREADS))
            if self.kind.shared:
                self._idle.append(session)
            return session

    def put_back(self, session: Any) -> None:
        """After a run."""
        if not self.kind.shared:
            with self._lock:
                self._idle.append(session)


class Soak:
    """Threads that run and compare until they are told to stop."""

    def __init__(self, folder: Path, cpus: float) -> None:
        """`cpus`: seconds of CPU time that the process may take for each second."""
        self._expected: dict[str, str] = json.loads((folder / EXPECTED).read_text())
        self._sessions = [Sessions(kind) for kind in kinds(folder) if kind.name in self._expected]
        self._cpus = cpus
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._runs: Counter[str] = Counter()
        self._errors: list[str] = []
        self._wrong = 0

    def work(self, seed: int) -> None:
        """One thread."""
        rng = random.Random(seed)
        while not self._stop.is_set():
            start, used = time.monotonic(), time.process_time()
            sessions = rng.choice(self._sessions)
            error = self._once(sessions, rng)
            with self._lock:
                self._runs[sessions.kind.name] += 1
                if error:
                    self._wrong += 1
                    self._errors = [*self._errors, f"{sessions.kind.name}: {error}"][:MOST_ERRORS]
            # All threads see the time that all of them took.
            self._stop.wait(max(0.0, (time.process_time() - used) / self._cpus - (time.monotonic() - start)))

    def _once(self, sessions: Sessions, rng: random.Random) -> str:
        """What went wrong; nothing, if all is well."""
        try:
            session = sessions.take(rng)
            result = digest(sessions.kind.run(session))
            sessions.put_back(session)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "" if result == self._expected[sessions.kind.name] else f"other bits: {result}"

    def stop(self) -> None:
        """Ends all threads after their runs."""
        self._stop.set()

    def _stop_at_the_end_of_input(self) -> None:
        sys.stdin.read()
        self.stop()

    def report(self) -> None:
        """Prints a line."""
        with self._lock:
            opened = sum(sessions.opened for sessions in self._sessions)
            line = {"runs": self._runs, "opened": opened, "wrong": self._wrong, "errors": self._errors}
            print(json.dumps(line), flush=True)

    def run(self, threads: int, seed: int) -> None:
        """Until standard input ends."""
        workers = [threading.Thread(target=self.work, args=(1000 * seed + index,)) for index in range(threads)]
        end = threading.Thread(target=self._stop_at_the_end_of_input, daemon=True)
        for thread in (*workers, end):
            thread.start()
        while not self._stop.wait(REPORT_SECONDS):
            self.report()
        for thread in workers:
            thread.join()
        self.report()


def main() -> None:
    """The process."""
    folder, threads, cpus, seed = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    Soak(folder, cpus).run(threads, seed)


if __name__ == "__main__":
    main()
