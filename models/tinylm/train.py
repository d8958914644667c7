"""Trains tinylm from nothing: tokenizer and weights.

    python -m sparamx_onnx.models.tinylm.train OUT_FOLDER

Fixed seeds, fixed steps. Sums are ordered by threads and instruction sets, so another machine ends near the committed
checkpoint, not on it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparamx_onnx.models.tinylm import text

END_OF_TEXT = "<|endoftext|>"
VOCAB = 2048
TOKENS_PER_STEP = 8192
# Short windows first, then long ones: (steps, tokens of a window).
STAGES = ((340, 256), (60, 2048))
WARM_UP = 20
MATRIX_RATE, OTHER_RATE, DECAY = 5e-3, 3e-3, 0.1
SAVED_EVERY = 100
HELD_OUT_CHARACTERS = 100_000
# For pruning: the beginnings of so many documents of the training text.
CALIBRATION_DOCUMENTS, CALIBRATION_CHARACTERS = 40, 2500


def configuration() -> transformers.LlamaConfig:
    """5.4 million weights; two queries share a key and value head of 64."""
    return transformers.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=688,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """A byte-level BPE; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> NDArray[np.int64]:
    """All documents in one row, each after an end-of-text token."""
    parts = [[0, *encoded.ids] for encoded in tokenizer.encode_batch(list(documents))]
    return np.concatenate([np.array(part, np.int64) for part in parts])


def batches(tokens: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Windows [batch, length + 1] in random order; each pass over the text cuts it elsewhere."""
    rng = np.random.default_rng(0)
    for steps, length in STAGES:
        rows = TOKENS_PER_STEP // length
        order: list[int] = []
        for _ in range(steps):
            if len(order) < rows:
                starts = np.arange(rng.integers(length), len(tokens) - length - 1, length)
                order = rng.permutation(starts).tolist()
            yield np.stack([tokens[start : start + length + 1] for start in (order.pop() for _ in range(rows))])


def rate(step: int) -> float:
    """The share of the learning rate at a step: up, then straight down to zero."""
    steps = sum(count for count, _ in STAGES)
    return min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))


def train(model: Any, tokens: NDArray[np.int64], folder: Path) -> None:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms; saves into `folder` now and then."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or ".layers." not in name]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    start, used = time.perf_counter(), time.process_time()
    mean = math.log(VOCAB)
    for step, batch in enumerate(batches(tokens)):
        for optimizer, peak in ((muon, MATRIX_RATE), (adam, OTHER_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step)
        windows = torch.from_numpy(batch)
        loss = loss_of(model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in (muon, adam):
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
        mean += (float(loss.detach()) - mean) * 0.05
        if step % 10 == 9:
            seconds, cpu = time.perf_counter() - start, time.process_time() - used
            print(f"step {step + 1}: loss {mean:.3f}, {seconds:.0f} s, {cpu:.0f} s of CPU", flush=True)
        if step % SAVED_EVERY == SAVED_EVERY - 1:
            save(model, folder)


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each window's tokens after its first, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def save(model: Any, folder: Path) -> None:
    """Configuration and weights, the weights as bfloat16."""
    copy: Any = transformers.LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)


def perplexity(model: Any, tokens: NDArray[np.int64], length: int = 512) -> float:
    """Exponential of the mean loss per token over windows of `length` tokens that do not overlap."""
    count = (len(tokens) - 1) // length
    windows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
    with torch.no_grad():
        losses = [float(loss_of(model, torch.from_numpy(part))) for part in np.array_split(windows, max(1, count // 8))]
    return math.exp(float(np.mean(losses)))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer as transformers and onnxruntime-genai read it."""
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def keep_freed_memory() -> None:
    """Stops glibc from giving large blocks back: getting them anew, zeroed, makes a step six times slower."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(description="Trains tinylm.")
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER")
    # The products are small, and threads that wait for each other wait long on a busy machine.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    corpus = text.fetch()
    tokenizer = train_tokenizer(corpus.training)
    save_tokenizer(tokenizer, folder)
    (folder / "held_out.txt").write_text("\n".join(corpus.held_out)[:HELD_OUT_CHARACTERS], encoding="utf-8")
    chosen = corpus.training[:: max(1, len(corpus.training) // CALIBRATION_DOCUMENTS)]
    calibration = "\n".join(document[:CALIBRATION_CHARACTERS] for document in chosen)
    (folder / "calibration.txt").write_text(text.without_addresses(calibration), encoding="utf-8")
    tokens = encode(tokenizer, corpus.training)
    print(f"{len(corpus.training)} documents, {len(tokens)} tokens", flush=True)
    model: Any = transformers.LlamaForCausalLM(configuration())
    used = time.process_time()
    train(model, tokens, folder)
    save(model, folder)
    figures = {
        "tokens": len(tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_minutes": round((time.process_time() - used) / 60, 1),
        "held_out_perplexity": round(perplexity(model.eval(), encode(tokenizer, corpus.held_out)), 2),
    }
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
