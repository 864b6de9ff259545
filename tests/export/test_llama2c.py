"""llama2.c's files: read as a model, and written again."""

import json
import struct

import numpy as np
import pytest
import torch
from tests.export.tokenizers_made import byte_level

from whet.config_file import load_config
from whet.errors import InputError
from whet.export.llama2c import export_llama2c, write_checkpoint, write_tokenizer
from whet.export.tensors import open_weights
from whet.model.load import load_model, load_tokenizer, resolve
from whet.sections import ModelSection
from whet.train.recipe import LogListener, fit

FIRST = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
    "day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
SIZES = {"dim": 16, "hidden": 24, "layers": 2, "heads": 4, "kv": 2, "vocab": 300, "context": 32}


def write_random(folder, tied=True, **more):
    """Write a random checkpoint with a tokenizer by hand, as the format says."""
    sizes = {**SIZES, **more}
    dim, hidden, layers, heads, kv, vocab, context = sizes.values()
    head = dim // heads
    counts = [vocab * dim, layers * dim, layers * dim * dim, *[layers * kv * head * dim] * 2,
              layers * dim * dim, layers * dim, *[layers * hidden * dim] * 3, dim]  # fmt: skip
    values = [np.random.default_rng(0).normal(0, 0.3, n).astype("<f4") for n in counts]
    frequencies = 1.0 / 10000 ** (np.arange(0, head, 2) / head)
    angles = np.outer(np.arange(context), frequencies)
    values += [np.cos(angles).astype("<f4").ravel(), np.sin(angles).astype("<f4").ravel()]
    if not tied:
        values.append(np.random.default_rng(1).normal(0, 0.3, vocab * dim).astype("<f4"))
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocab if tied else -vocab, context)
    (folder / "m.bin").write_bytes(header + b"".join(v.tobytes() for v in values))
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % n for n in range(256))]
    scores = [0.0] * len(pieces)
    more_pieces = [b" t", b"he", b" the", b" ", *(b"%c" % n for n in range(97, 123))]
    for rank, piece in enumerate(more_pieces + [b"[%d]" % n for n in range(vocab)]):
        if len(pieces) < vocab:
            pieces.append(piece)
            scores.append(-float(rank))
    packed = [struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True)]
    (folder / "tokenizer.bin").write_bytes(
        struct.pack("<i", max(map(len, pieces))) + b"".join(packed)
    )
    return folder / "m.bin", header, values


def plain_logits(values, ids, tied):
    """Compute the model in float64, neighbours rotated, straight from the file's order."""
    s = SIZES
    head = s["dim"] // s["heads"]
    shapes = [(s["vocab"], s["dim"]), (2, 16), (2, 16, 16), (2, 8, 16), (2, 8, 16), (2, 16, 16), (2, 16),
              (2, 24, 16), (2, 16, 24), (2, 24, 16), (16,), (32, head // 2), (32, head // 2)]  # fmt: skip
    w = [v.astype(np.float64).reshape(shape) for v, shape in zip(values, shapes, strict=False)]
    embedding, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, last, cos, sin = w
    top = embedding if tied else values[-1].astype(np.float64).reshape(s["vocab"], s["dim"])

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # (tokens, heads, head)
        even, odd = x[..., 0::2], x[..., 1::2]
        c, d = cos[: len(x), None], sin[: len(x), None]
        return np.stack([even * c - odd * d, even * d + odd * c], -1).reshape(x.shape)

    x = embedding[ids]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for n in range(s["layers"]):
        h = norm(x, norm1[n])
        q = rotate((h @ wq[n].T).reshape(len(ids), s["heads"], head))
        k = rotate((h @ wk[n].T).reshape(len(ids), s["kv"], head))
        v = (h @ wv[n].T).reshape(len(ids), s["kv"], head)
        out = []
        for i in range(s["heads"]):
            group = i // (s["heads"] // s["kv"])
            a = q[:, i] @ k[:, group].T / np.sqrt(head) + mask
            a = np.exp(a - a.max(-1, keepdims=True))
            out.append(a / a.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(out, -1) @ wo[n].T
        h = norm(x, norm2[n])
        gate = h @ w1[n].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[n].T)) @ w2[n].T
    return norm(x, last) @ top.T


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_computes_what_its_format_says(tied, tmp_path):
    path, _, values = write_random(tmp_path, tied)
    ids = [1, 270, 33, 280, 5]
    truth = plain_logits(values, ids, tied)
    model = load_model(ModelSection(name=str(path)), torch.float32)
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - truth).max() <= 1e-5 * np.abs(truth).max()


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_checkpoint_goes_back_bit_for_bit(tied, tmp_path):
    path, header, values = write_random(tmp_path, tied)
    section = ModelSection(name=str(path))
    write_checkpoint(open_weights(section), tmp_path / "back.bin")
    back = (tmp_path / "back.bin").read_bytes()
    assert back[:28] == header
    weights = b"".join(v.tobytes() for v in values[:11])
    assert back[28 : 28 + len(weights)] == weights
    tables = np.concatenate(values[11:13])
    again = np.frombuffer(back, "<f4", len(tables), 28 + len(weights))
    assert np.abs(again - tables).max() <= 2**-22  # computed anew: sines of float32 angles below 32
    if not tied:
        assert back[28 + len(weights) + 4 * len(tables) :] == values[-1].tobytes()
    write_tokenizer(load_tokenizer(section), SIZES["vocab"], tmp_path / "back.tok")
    assert (tmp_path / "back.tok").read_bytes() == (tmp_path / "tokenizer.bin").read_bytes()


def test_what_is_no_checkpoint_is_told(tmp_path):
    path, _, _ = write_random(tmp_path)
    (tmp_path / "short.bin").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="its size is not what the header"):
        resolve(str(tmp_path / "short.bin"))
    (tmp_path / "new.bin").write_bytes(struct.pack("<II", 0x616B3432, 2) + bytes(300))
    with pytest.raises(InputError, match="of version 2; export it as version 0"):
        resolve(str(tmp_path / "new.bin"))
    (tmp_path / "tokenizer.bin").write_bytes((tmp_path / "tokenizer.bin").read_bytes()[:-2])
    with pytest.raises(InputError, match="not a llama2.c tokenizer of 300 pieces"):
        resolve(str(path))
    (tmp_path / "tokenizer.bin").unlink()
    with pytest.raises(InputError, match="no tokenizer beside.*tok300.bin or tokenizer.bin"):
        resolve(str(path))


def test_a_model_of_another_shape_is_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match="the norm's epsilon is 1e-06(.|\n)*a bias is True"):
        write_checkpoint(open_weights(ModelSection(name=str(tiny_model))), tmp_path / "m.bin")
    with pytest.raises(InputError, match="SentencePiece tokenizers only"):
        write_tokenizer(byte_level("gpt-2"), 1000, tmp_path / "t.bin")
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.shared
def test_stories260k_tells_its_story_and_goes_back(shared, tmp_path):
    folder = shared / "models" / "stories260K"
    section = ModelSection(name=str(folder / "stories260K.bin"))
    model, tokenizer = load_model(section, torch.float32), load_tokenizer(section)
    with torch.inference_mode():
        top = model(torch.tensor([[1]])).logits[0, 0].topk(3)
        told = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0]
    assert top.indices.tolist() == [403, 385, 410]
    assert top.values.tolist() == pytest.approx([17.023, 15.406, 13.108], abs=1e-3)
    assert told[1:13].tolist() == FIRST
    assert tokenizer.decode(told, skip_special_tokens=True).startswith(STORY)
    write_checkpoint(open_weights(section), tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == (folder / "stories260K.bin").read_bytes()
    write_tokenizer(tokenizer, 512, tmp_path / "back.tok")
    assert (tmp_path / "back.tok").read_bytes() == (folder / "tok512.bin").read_bytes()


@pytest.mark.shared
def test_stories260k_is_fine_tuned_and_exported(shared, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [f"Once upon a time, there was a big red dog. He had {n} friends." for n in range(12)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = load_config({
        "run": {"name": "dog", "dir": str(tmp_path / "runs")},
        "model": {"name": str(shared / "models" / "stories260K" / "stories260K.bin"), "dtype": "float32"},
        "data": {"train": str(rows)}, "lora": {"rank": 4},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-3},
    })  # fmt: skip
    run = fit(config, listener=LogListener())
    files, (gate,) = export_llama2c(run, tmp_path / "out")
    assert gate.passed, gate.causes
    section = ModelSection(name=str(files[0]))
    before = load_model(config.model, torch.float32).state_dict()
    after = load_model(section, torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert json.loads((tmp_path / "out" / "check.json").read_text())[0]["passed"]
