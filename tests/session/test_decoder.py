"""DecoderSession over a decoder of one layer with ONNX Runtime's operator, and with ours in its place."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import DecoderSession, SparamxError

VOCAB, HEADS, KV_HEADS, SIZE = 50, 4, 2, 16
WIDTH = HEADS * SIZE
CAPACITY = 40


def one_layer(positions: int = CAPACITY, **changes: str) -> onnx.ModelProto:
    """As onnxruntime-genai's builder writes decoders: lengths from the mask, QKV in one, rotation in the operator."""
    rng = np.random.default_rng(0)
    angles = np.arange(positions)[:, None] * 100.0 ** -np.linspace(0, 1, SIZE // 2)
    constants = {
        "embedding": rng.standard_normal((VOCAB, WIDTH)),
        "qkv": rng.standard_normal((WIDTH, WIDTH + 2 * KV_HEADS * SIZE)) / 4,
        "head": rng.standard_normal((WIDTH, VOCAB)),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([1]), "one"))
    initializers.append(numpy_helper.from_array(np.array(1), "index"))
    attention = helper.make_node(
        "GroupQueryAttention",
        ["row", "", "", "past_key_values.0.key", "past_key_values.0.value", "seqlens", "total", "cos", "sin"],
        ["attention", "present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        do_rotary=1,
    )
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["sums"], keepdims=0),
        helper.make_node("Sub", ["sums", "one"], ["lasts"]),
        helper.make_node("Cast", ["lasts"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "index"], ["columns"]),
        helper.make_node("Cast", ["columns"], ["total"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "qkv"], ["row"]),
        attention,
        helper.make_node("Add", ["attention", "x"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    cache = [
        helper.make_tensor_value_info(f"{kind}.0.{part}", TensorProto.FLOAT, ["batch", KV_HEADS, length, SIZE])
        for kind, length in (("past_key_values", "past"), ("present", "all"))
        for part in ("key", "value")
    ]
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB])
    graph = helper.make_graph(nodes, "decoder", [tokens, mask, *cache[:2]], [logits, *cache[2:]], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    for value in [*model.graph.input, *model.graph.output]:
        value.name = changes.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [changes.get(name, name) for name in node.input]
        node.output[:] = [changes.get(name, name) for name in node.output]
    return model


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoders")
    onnx.save(one_layer(), folder / "dense.onnx")
    sparamx_onnx.convert(folder / "dense.onnx", folder / "fast.onnx", method="keep", weights="fp32", attention="fast")
    return {"dense": folder / "dense.onnx", "fast": folder / "fast.onnx"}


@pytest.fixture(params=["dense", "fast"])
def decoder(request: pytest.FixtureRequest, paths: dict[str, Path]) -> DecoderSession:
    return DecoderSession(paths[request.param], capacity=CAPACITY)


LONG = 320


@pytest.fixture(scope="module")
def long_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With room for blocks of a packed cache: the original, the fast one and two packed ones."""
    folder = tmp_path_factory.mktemp("packed")
    onnx.save(one_layer(LONG), folder / "dense.onnx")
    whole, pruned = {"k_sparsity": 0, "v_sparsity": 0}, {"k_sparsity": 0.4, "v_sparsity": 0.6, "recent": 10}
    modes = {"fast": {"attention": "fast"}, "whole": {"attention": "packed", **whole}}
    modes["pruned"] = {"attention": "packed", "sink": 0, **pruned}
    for name, options in modes.items():
        sparamx_onnx.convert(folder / "dense.onnx", folder / f"{name}.onnx", method="keep", weights="fp32", **options)
    return {name: folder / f"{name}.onnx" for name in ("dense", *modes)}


def tokens(batch: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, count))


def same(result: np.ndarray, expected: np.ndarray) -> bool:
    return result.shape == expected.shape and float(np.abs(result - expected).max() / np.abs(expected).max()) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_steps_equal_one_pass(decoder: DecoderSession, batch: int) -> None:
    text = tokens(batch, CAPACITY)
    expected = decoder.append(text)
    assert expected.shape == (batch, CAPACITY, VOCAB)
    assert expected.dtype == np.float32
    assert same(decoder.prefill(text[:, :11]), expected[:, 10])
    for position in range(11, CAPACITY):
        assert same(decoder.step(text[:, position]), expected[:, position]), position
    assert decoder.lengths.tolist() == [CAPACITY] * batch


def test_converted_and_original_give_the_same(paths: dict[str, Path]) -> None:
    text = tokens(2, 30)
    dense, fast = (DecoderSession(paths[name], capacity=CAPACITY) for name in ("dense", "fast"))
    for part in np.split(text, [17, 18, 19], axis=1)[:3]:
        assert same(fast.append(part), dense.append(part))


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_attention_that_is_converted_later_leaves_the_weights_record(
    paths: dict[str, Path], tmp_path: Path, weights: str
) -> None:
    """By which verify judges: what the second conversion says of weights, of which it packs none, does not count."""
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    sparamx_onnx.convert(paths["dense"], first, weights=weights, method="magnitude", sparsity=0.1)
    sparamx_onnx.convert(first, second, attention="fast", weights="int8")
    before, after = (sparamx_onnx.verify(paths["dense"], path) for path in (first, second))
    assert after.tolerance == before.tolerance == {"int4": 0.6, "fp32": 1e-4}[weights]
    assert after.pruned == "magnitude"
    assert sparamx_onnx.inspect(second).record["attention"] == "fast"


def test_rows_of_different_length_do_not_see_each_other(decoder: DecoderSession) -> None:
    text = tokens(3, 30)
    prompts = [text[row, :count].tolist() for row, count in enumerate((4, 20, 1))]
    alone = []
    for row, prompt in enumerate(prompts):
        logits = [decoder.prefill([prompt])]
        logits += [decoder.step(text[row, 20 + step : 21 + step]) for step in range(5)]
        alone.append(np.concatenate(logits))
    together = [decoder.prefill(prompts)] + [decoder.step(text[:, 20 + step]) for step in range(5)]
    assert decoder.lengths.tolist() == [9, 25, 6]
    for row, expected in enumerate(alone):
        assert same(np.stack(together)[:, row], expected), row


def test_a_context_can_be_pretended(decoder: DecoderSession) -> None:
    decoder.pretend(2, 30)
    assert decoder.lengths.tolist() == [30, 30]
    after_noise = decoder.step([1, 2])
    assert decoder.lengths.tolist() == [31, 31]
    assert np.isfinite(after_noise).all()
    decoder.pretend(2, 30)
    assert np.array_equal(decoder.step([1, 2]), after_noise)
    assert not same(decoder.prefill([[1], [2]]), after_noise)
    with pytest.raises(SparamxError, match="1 rows of 41 tokens do not fit a capacity of 40"):
        decoder.pretend(1, CAPACITY + 1)


def test_past_and_present_are_one_buffer_that_stays_where_it_is(decoder: DecoderSession) -> None:
    assert decoder.shares_buffers
    decoder.prefill(tokens(2, 5))
    places = {name: buffer.data_ptr() for name, buffer in decoder._buffers.items()}
    assert all(place % 64 == 0 for place in places.values())
    before = {name: buffer.numpy()[:, :, :5].copy() for name, buffer in decoder._buffers.items()}
    decoder.step([1, 2])
    for name, buffer in decoder._buffers.items():
        content = buffer.numpy()
        assert buffer.data_ptr() == places[name]
        assert np.array_equal(content[:, :, :5], before[name])
        assert np.abs(content[:, :, 5]).max() > 0
        assert not content[:, :, 6:].any()
    assert decoder.cache_bytes == 2 * 2 * KV_HEADS * CAPACITY * SIZE * 4


def test_logits_of_a_step_stay_as_long_as_someone_holds_them(decoder: DecoderSession) -> None:
    text = tokens(1, 6)
    decoder.prefill(text[:, :2])
    held = [decoder.step(text[:, position]) for position in range(2, 6)]
    part_of_it, before = held[-1][0, 3:9], held[-1][0, 3:9].copy()
    decoder.prefill(text[:, :2])
    for position, logits in zip(range(2, 6), held, strict=True):
        assert same(decoder.step(text[:, position]), logits)
    del held, logits
    decoder.step(text[:, 0])
    assert (part_of_it == before).all()


def test_memory_of_logits_that_nobody_holds_is_written_again(decoder: DecoderSession) -> None:
    decoder.prefill(tokens(1, 2))
    assert len({decoder.step([3]).ctypes.data for _ in range(4)}) == 1
    logits, addresses = decoder.step([3]), set()
    for _ in range(6):
        logits = decoder.step(logits.argmax(axis=1))
        addresses.add(logits.ctypes.data)
    assert len(addresses) == 2


def test_another_batch_gets_a_cache_of_its_own_size(decoder: DecoderSession) -> None:
    text = tokens(3, 6)
    expected = decoder.append(text)
    decoder.reset()
    assert (decoder.batch, decoder.lengths.tolist()) == (0, [])
    assert same(decoder.append(text[:1]), expected[:1])
    decoder.reset()
    assert same(decoder.append(text), expected)


def test_generate_takes_the_most_likely_token(decoder: DecoderSession) -> None:
    prompt = tokens(1, 5)[0].tolist()
    expected = list(prompt)
    for _ in range(12):
        decoder.reset()
        expected.append(int(decoder.append([expected])[0, -1].argmax()))
    assert decoder.generate([prompt], 12) == [expected[5:]]
    assert decoder.generate([prompt], 12, temperature=0.7, top_k=1) == [expected[5:]]
    other = [7, 7]
    both = decoder.generate([other, prompt], 12)
    assert both == [decoder.generate([other], 12)[0], expected[5:]]
    stop = expected[8]
    assert decoder.generate([prompt], 12, stop=[stop]) == [expected[5 : expected.index(stop, 5)]]
    assert decoder.generate([prompt], 0) == [[]]


def test_draws_follow_the_seed_and_the_logits(decoder: DecoderSession) -> None:
    prompt = tokens(1, 5)[0].tolist()
    options = {"temperature": 2.0, "top_k": 10}
    first = decoder.generate([prompt], 20, seed=1, **options)
    assert first == decoder.generate([prompt], 20, seed=1, **options)
    assert first != decoder.generate([prompt], 20, seed=2, **options)
    logits = decoder.prefill([prompt])[0] / 4
    likely = np.argsort(-logits)[:3]
    drawn = [decoder.generate([prompt], 1, temperature=4.0, top_k=3, seed=seed)[0][0] for seed in range(400)]
    shares = [drawn.count(int(token)) / len(drawn) for token in likely]
    weights = np.exp(logits[likely] - logits[likely].max())
    assert sum(shares) == 1
    assert np.abs(np.array(shares) - weights / weights.sum()).max() < 0.1


def test_what_does_not_fit_is_refused_and_leaves_the_cache_as_it_was(decoder: DecoderSession) -> None:
    text = tokens(2, CAPACITY)
    expected = decoder.append(text[:, :30])[:, 29]
    assert expected.shape == (2, VOCAB)
    decoder.prefill(text[:, :29])
    with pytest.raises(SparamxError, match="29 tokens and 12 more are above the capacity of 40"):
        decoder.append(tokens(2, 12))
    with pytest.raises(SparamxError, match="the cache holds 2 rows, and there are tokens for 3"):
        decoder.step([1, 2, 3])
    with pytest.raises(SparamxError, match="ONNX Runtime cannot run this decoder"):
        decoder.step([1, VOCAB])
    with pytest.raises(SparamxError, match=r"shape \[batch, tokens\]"):
        decoder.append(np.zeros((2, 0), int))
    assert same(decoder.step(text[:, 29]), expected)
    for prompts in ([], [[1], []]):
        with pytest.raises(SparamxError, match="at least one token"):
            decoder.prefill(prompts)
    with pytest.raises(SparamxError, match="must not be negative"):
        decoder.generate([[1]], 3, temperature=-1)


_grows = pytest.mark.skipif(
    onnxruntime.__version__.startswith("1.21."),
    reason="GroupQueryAttention of onnxruntime 1.21 crashes where a cache grows",
)


def growing() -> onnx.ModelProto:
    """The same, but what it writes is not what it reads, and nothing tells how many logits there are."""
    model = one_layer()
    [attention] = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for index, name in enumerate(list(attention.output[1:]), 1):
        attention.output[index] = f"{name}.made"
        model.graph.node.append(helper.make_node("Identity", [f"{name}.made"], [name]))
    model.graph.node[-3].output[0] = "all"  # the logits
    model.graph.node.append(helper.make_node("Compress", ["all", "wanted"], ["logits"], axis=2))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(VOCAB, bool), "wanted"))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "vocabulary"
    return model


@_grows
def test_a_cache_that_grows_gives_the_same(paths: dict[str, Path], tmp_path: Path) -> None:
    onnx.save(growing(), tmp_path / "growing.onnx")
    shared, grown = (DecoderSession(path, capacity=CAPACITY) for path in (paths["dense"], tmp_path / "growing.onnx"))
    assert (shared.shares_buffers, grown.shares_buffers) == (True, False)
    text = tokens(1, 20)
    for start in (11, 9):  # twice: it must forget what was there
        assert same(grown.prefill(text[:, :start]), shared.prefill(text[:, :start]))
        for position in range(start, 20):
            assert same(grown.step(text[:, position]), shared.step(text[:, position]))
        assert grown.lengths.tolist() == [20]
        assert grown.cache_bytes == 2 * KV_HEADS * 20 * SIZE * 4
        assert shared.cache_bytes == 2 * KV_HEADS * CAPACITY * SIZE * 4
    for decoder in (grown, shared):
        decoder.pretend(1, 7)
        assert decoder.step([3]).shape == (1, VOCAB)
        assert decoder.lengths.tolist() == [8]
    grown.reset()
    assert (grown.batch, grown.cache_bytes) == (0, 0)


@_grows
def test_a_model_without_a_mask_takes_rows_of_one_length(tmp_path: Path) -> None:
    """It would take the padding of shorter rows for tokens."""
    model = growing()
    del model.graph.input[1]
    sizes = {"rows": ("input_ids", 0), "new": ("input_ids", 1), "old": ("past_key_values.0.key", 2)}
    model.graph.node.extend(
        [
            *(helper.make_node("Shape", [of], [name], start=at, end=at + 1) for name, (of, at) in sizes.items()),
            helper.make_node("Add", ["new", "old"], ["length"]),
            helper.make_node("Concat", ["rows", "length"], ["whole"], axis=0),
            helper.make_node(
                "ConstantOfShape", ["whole"], ["attention_mask"], value=numpy_helper.from_array(np.array([1]))
            ),
        ]
    )
    nodes = [model.graph.node.pop() for _ in range(6)][::-1] + list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    decoder = DecoderSession(tmp_path / "model.onnx", capacity=CAPACITY)
    assert decoder.prefill([[1, 2], [3, 4]]).shape == (2, VOCAB)
    with pytest.raises(SparamxError, match="rows differ in length, and the model has no attention_mask or seqlens_k"):
        decoder.prefill([[1, 2], [3]])


def test_inputs_and_caches_of_other_kinds_are_refused(tmp_path: Path) -> None:
    floats, heads = one_layer(), one_layer()
    for node in floats.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    floats.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT64))
    floats.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    for value in (heads.graph.input[2], heads.graph.output[1]):
        value.type.tensor_type.shape.dim[1].dim_param = "heads"
    for model, message in (
        (floats, r"input_ids should be int32 or int64, and is tensor\(float\)"),
        (heads, r"does not tell how many heads past_key_values\.0\.key has"),
    ):
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(SparamxError, match=message):
            DecoderSession(tmp_path / "model.onnx")


def test_a_capacity_beyond_the_rotary_table_fails_in_a_sentence(paths: dict[str, Path]) -> None:
    decoder = DecoderSession(paths["fast"], capacity=2 * CAPACITY)
    decoder.prefill(tokens(1, CAPACITY))
    with pytest.raises(SparamxError, match="ONNX Runtime cannot run this decoder"):
        decoder.step([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": "tokens"}, "does not know what to give to the input tokens"),
        ({"logits": "scores"}, "no decoder with a cache"),
        ({"attention_mask": "mask"}, "does not know what to give to the input mask"),
    ],
)
def test_models_that_it_does_not_understand_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    onnx.save(one_layer(**changes), tmp_path / "model.onnx")
    with pytest.raises(SparamxError, match=message):
        DecoderSession(tmp_path / "model.onnx")


def test_unusable_files_and_capacities_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SparamxError, match=r"missing\.onnx"):
        DecoderSession(tmp_path / "missing.onnx")
    (tmp_path / "damaged.onnx").write_bytes(paths["dense"].read_bytes()[:900])
    with pytest.raises(SparamxError, match=r"damaged\.onnx"):
        DecoderSession(tmp_path / "damaged.onnx")
    with pytest.raises(SparamxError, match="capacity"):
        DecoderSession(paths["dense"], capacity=0)


def test_options_and_threads_are_those_that_were_asked_for(paths: dict[str, Path]) -> None:
    options = onnxruntime.SessionOptions()
    decoder = DecoderSession(paths["fast"], threads=1, session_options=options)
    assert options.intra_op_num_threads == 1
    assert decoder.session.get_outputs()[0].name == "logits"


def near(result: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return (
        result.shape == expected.shape and float(np.abs(result - expected).max() / np.abs(expected).max()) < tolerance
    )


def in_blocks(decoder: DecoderSession, text: np.ndarray) -> np.ndarray:
    """Logits of a text that is read a block at a time, so that blocks are packed when they are after single steps."""
    return np.concatenate([decoder.append(text[:, at : at + 64]) for at in range(0, text.shape[1], 64)], axis=1)


def test_a_packed_cache_that_nothing_is_pruned_in_differs_by_rounding(long_paths: dict[str, Path]) -> None:
    text = tokens(2, LONG)
    dense = in_blocks(DecoderSession(long_paths["fast"], capacity=LONG), text)
    whole = DecoderSession(long_paths["whole"], capacity=LONG)
    assert near(in_blocks(whole, text), dense, 2e-2)
    pruned = DecoderSession(long_paths["pruned"], capacity=LONG)
    result = in_blocks(pruned, text)
    # What no packed block is seen by is only rounded; pruning is no rounding.
    assert near(result[:, :64], dense[:, :64], 2e-2)
    assert not near(result, dense, 2e-2)
    assert pruned.shares_buffers
    assert pruned.cache_bytes < whole.cache_bytes < 2 * 2 * KV_HEADS * LONG * SIZE * 4


@pytest.mark.parametrize("kind", ["whole", "pruned"])
def test_token_after_token_equals_recomputation_from_a_packed_cache(long_paths: dict[str, Path], kind: str) -> None:
    text = tokens(2, LONG)
    decoder, again = (DecoderSession(long_paths[kind], capacity=LONG) for _ in range(2))
    steps = np.stack([decoder.step(text[:, position]) for position in range(LONG)], axis=1)
    for length in (1, 63, 64, 65, 74, 75, 138, 139, 200, 319):
        # Recomputed: the same blocks are packed after calls that end where a block becomes old enough.
        again.reset()
        ends = range(74 if kind == "pruned" else 64, length, 64)
        for part in np.split(text[:, :length], ends, axis=1):
            again.append(part)
        assert near(again.step(text[:, length]), steps[:, length], 1e-5), length


def test_rows_of_a_packed_cache_do_not_see_each_other(long_paths: dict[str, Path]) -> None:
    text = tokens(3, LONG)
    counts = (150, 7, 210)
    decoder = DecoderSession(long_paths["pruned"], capacity=LONG)
    together = [decoder.prefill([text[row, :count].tolist() for row, count in enumerate(counts)])]
    together += [decoder.step(text[:, 210 + step]) for step in range(80)]
    for row, count in enumerate(counts):
        alone = [decoder.prefill([text[row, :count].tolist()])]
        alone += [decoder.step(text[row : row + 1, 210 + step]) for step in range(80)]
        assert near(np.concatenate(alone), np.stack(together)[:, row], 1e-5), row


def test_a_packed_cache_begins_anew_after_reset_and_other_batches(long_paths: dict[str, Path]) -> None:
    decoder = DecoderSession(long_paths["pruned"], capacity=LONG)
    first = in_blocks(decoder, tokens(2, 200))
    decoder.reset()
    in_blocks(decoder, tokens(1, 90, seed=5))
    decoder.reset()
    assert np.array_equal(in_blocks(decoder, tokens(2, 200)), first)
    with pytest.raises(SparamxError, match="200 tokens and 121 more are above the capacity of 320"):
        decoder.append(tokens(2, 121))


@pytest.mark.parametrize("kind", ["dense", "fast", "pruned"])
def test_a_pretended_past_is_read_like_another(long_paths: dict[str, Path], kind: str) -> None:
    decoder = DecoderSession(long_paths[kind], capacity=LONG)
    for length in (0, 5, 250, 300):
        decoder.pretend(2, length)
        logits = decoder.step([1, 2])
        assert np.isfinite(logits).all()
        assert decoder.lengths.tolist() == [length + 1] * 2
        decoder.pretend(2, length)
        assert np.array_equal(decoder.step([1, 2]), logits)


def test_verify_compares_logits_and_inspect_lists_the_caches(long_paths: dict[str, Path], tmp_path: Path) -> None:
    result = sparamx_onnx.verify(long_paths["dense"], long_paths["whole"])
    assert result.passed
    assert [output.name for output in result.outputs] == ["logits"]
    text = {"input_ids": tokens(1, 200), "attention_mask": np.ones((1, 200), np.int64)}
    past = {f"past_key_values.0.{part}": np.zeros((1, KV_HEADS, 0, SIZE), np.float32) for part in ("key", "value")}
    assert sparamx_onnx.verify(long_paths["dense"], long_paths["whole"], inputs={**text, **past}).passed
    pruned = sparamx_onnx.verify(long_paths["dense"], long_paths["pruned"], inputs={**text, **past})
    assert not pruned.passed
    past = {name: np.zeros((1, KV_HEADS, 3, SIZE), np.float32) for name in past}
    with pytest.raises(SparamxError, match="must not bring a past"):
        sparamx_onnx.verify(long_paths["dense"], long_paths["whole"], inputs={**text, **past})
    [cache] = sparamx_onnx.inspect(long_paths["pruned"]).caches
    assert (cache.past, cache.present) == ("past_key_values.0.cache", "present.0.cache")
    assert (cache.k_sparsity, cache.v_sparsity, cache.sink, cache.recent) == (0.4, 0.6, 0, 10)
    assert sparamx_onnx.inspect(long_paths["fast"]).caches == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not JSON", "do not describe packed caches"),
        ('[{"past": "x"}]', "do not describe"),
        ("[]", "should be a float cache"),
    ],
)
def test_damaged_descriptions_of_caches_are_refused(
    long_paths: dict[str, Path], tmp_path: Path, record: str, message: str
) -> None:
    model = onnx.load(long_paths["pruned"])
    [entry] = [entry for entry in model.metadata_props if entry.key == "sparamx.caches"]
    entry.value = record
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SparamxError, match=message):
        DecoderSession(tmp_path / "model.onnx")
