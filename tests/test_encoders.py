"Encoders: other architectures than the notebook's, damaged models and caches, killed and competing processes, bad input."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddcl_nb import encoders
from ddcl_nb.encoders import Encoder, ModelNotLoaded, TokenEmbeddings

transformers = pytest.importorskip("transformers", reason="needs the extra text")
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402  (comes with transformers)

WORDS = "the a satellite orbit decays burns over pole equator ocean at dawn while debris drifts".split()
KINDS = ["bert", "gpt2", "t5"]


def save_tokenizer(folder: Path, special: bool, padding: bool) -> None:
    "A tokenizer of single words; with [CLS] and [SEP] around a text if `special`, without a padding token unless `padding`."
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    roles = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]") | (dict(pad_token="[PAD]") if padding else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=100, **roles).save_pretrained(folder)


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    "A small random model of a kind, with its tokenizer, in a folder."
    torch.manual_seed(seed)
    size = len(WORDS) + 4
    model = {"bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=80)),
             "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=90)),
             "t5": lambda: transformers.T5Model(transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))}[kind]()
    model.save_pretrained(folder)
    save_tokenizer(folder, special=kind != "gpt2", padding=kind != "gpt2")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bert(folders) -> Encoder:
    return Encoder(folders["bert"], device="cpu")


@pytest.fixture
def small(folders) -> Encoder:
    "A BERT with shards of four texts."
    encoder = Encoder(folders["bert"], device="cpu")
    encoder.shard_size = 4
    return encoder


def sentences(count: int, seed: int = 0, longest: int = 20) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]


@torch.no_grad()
def plain(folder: Path, text: str, max_length: int) -> torch.Tensor:
    "The embeddings of one text as transformers gives them, without any padding."
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    return model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0]


# ---- the same numbers as transformers

@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_loop(kind, folders):
    "Encoders, decoder-only models (no padding token) and the encoder of an encoder-decoder, in order, in batches of several lengths."
    texts, encoder = sentences(23), Encoder(folders[kind], device="cpu")
    encoder.shard_size = 7
    made = encoder.tokens(texts, max_length=12, batch_size=5, cache=False, keep="float32")
    assert made.embeddings.shape == (23, 12, 16)
    for row in range(0, 23, 4):
        torch.testing.assert_close(made.embeddings[row][made.mask[row]], plain(folders[kind], texts[row], 12), atol=1e-4, rtol=0)


def test_offline_model_equals_a_plain_loop():
    if encoders.offline_model() is None:
        pytest.skip("the extra offline is not installed")
    texts = ["Where is it?", "The perigee sinks at every revolution, until the atmosphere takes the satellite.", ""]
    made = Encoder("offline", device="cpu").tokens(texts, max_length=16, cache=False, keep="float32")
    for row, text in enumerate(texts):
        torch.testing.assert_close(made.embeddings[row][made.mask[row]], plain(encoders.offline_model(), text, 16), atol=1e-4, rtol=0)
    assert encoders.OFFLINE_PACKAGE not in sys.modules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_never_changes_a_result(kind, batch_size, folders):
    encoder, texts = Encoder(folders[kind], device="cpu"), ["a", "satellite decays over the ocean at dawn", "the pole"]
    together = encoder.tokens(texts, batch_size=batch_size, max_length=32, cache=False, keep="float32")
    for row, text in enumerate(texts):
        alone = encoder.tokens([text], max_length=32, cache=False, keep="float32")
        count = int(together.mask[row].sum())
        assert count == alone.mask.shape[1] and together.mask[row, :count].all()
        torch.testing.assert_close(together.embeddings[row, :count], alone.embeddings[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.mean()[row], alone.mean()[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.cls()[row], alone.cls()[0], atol=1e-4, rtol=0)
    assert together.embeddings[~together.mask].abs().sum() == 0


def test_a_text_without_tokens_is_defined(folders):
    "GPT-2 adds no special tokens, so an empty string has none: masked, zero, and no NaN in the mean."
    encoder = Encoder(folders["gpt2"], device="cpu")
    made = encoder.tokens(["", "the orbit decays"], cache=False)
    assert made.mask.sum(1).tolist() == [0, 3] and made.embeddings.isfinite().all()
    assert made.mean()[0].abs().sum() == 0 and made.cls()[0].abs().sum() == 0
    nothing = encoder.tokens(["", ""], cache=False)
    assert nothing.embeddings.shape == (2, 1, 16) and nothing.mean().abs().sum() == 0


def test_empty_strings_have_their_special_tokens(bert):
    made = bert.tokens(["", "the orbit"], cache=False)
    assert made.mask.sum(1).tolist() == [2, 4] and made.mean().isfinite().all()


def test_result_can_be_trained_on(bert):
    "Not an inference tensor: a layer on top gets its gradients."
    made, layer = bert.tokens(["the orbit"], cache=False), torch.nn.Linear(16, 1)
    layer(made.mean()).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision(dtype, folders, bert):
    encoder = Encoder(folders["bert"], device="cpu", dtype=dtype)
    half, full = encoder.tokens(sentences(5), cache=False, keep="bfloat16"), bert.tokens(sentences(5), cache=False, keep="float32")
    assert half.embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(half.mean(), full.mean(), atol=5e-2, rtol=0)


# ---- bad input

@pytest.mark.parametrize("texts, message", [([], r"one or more strings, got \[\]"), ("a text", "got 'a text'"), (["a", "b", 3], r"texts\[2\] must be a string, got 3 of type int"),
                                            ([None], r"texts\[0\] must be a string, got None"), (["a", b"b"], r"texts\[1\].*of type bytes"), (["a", float("nan")], r"texts\[1\].*got nan")])
def test_bad_texts(bert, texts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bert.tokens(texts, max_length=16, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [(dict(max_length=0), "max_length must be from 3 .*got 0"), (dict(max_length=-1), "got -1"), (dict(max_length=2), "2 special tokens.*got 2"),
                                                (dict(max_length=81), r"to 80 \(its limit\); got 81"), (dict(max_length=16, batch_size=0), "batch_size must be at least 1, got 0"),
                                                (dict(max_length=16, keep="int8"), "keep must be one of float32, float16, bfloat16; got 'int8'")])
def test_bad_arguments(bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        bert.tokens(["a"], cache=False, **arguments)


def test_bad_dtype(folders):
    with pytest.raises(ValueError, match="dtype must be one of .*got torch.float64"):
        Encoder(folders["bert"], device="cpu", dtype=torch.float64)


def test_limits_come_from_model_and_tokenizer(folders):
    assert Encoder(folders["bert"], device="cpu").limit == 80
    assert Encoder(folders["gpt2"], device="cpu").limit == 90
    assert Encoder(folders["t5"], device="cpu").limit == 100


@pytest.mark.parametrize("value, keep", [(float("nan"), "float32"), (1e6, "float16")])
def test_values_that_are_not_finite_are_refused(folders, value, keep, tmp_path):
    "A broken model, or values too large for half precision: an error, and nothing in the cache."
    encoder = Encoder(folders["bert"], device="cpu")
    encoder.model.encoder.layer[-1].output.LayerNorm.bias.data.fill_(value)
    with pytest.raises(ValueError, match="not finite .*float32"):
        encoder.tokens(["the orbit"], cache=tmp_path, keep=keep)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4), (3, 3))])
def test_token_embeddings_check_shapes(shapes):
    with pytest.raises(ValueError, match=r"\(N, L, d\)"):
        TokenEmbeddings(torch.zeros(shapes[0]), torch.ones(shapes[1], dtype=torch.bool))


def test_batches_cover_every_row_once():
    data = TokenEmbeddings(torch.randn(10, 3, 2).half(), torch.rand(10, 3) > 0.3)
    for shuffle in (False, True):
        rows = torch.cat([rows for rows, _, _ in data.batches(4, shuffle, seed=3)])
        assert sorted(rows.tolist()) == list(range(10)) and (rows.tolist() != list(range(10))) == shuffle
    again = torch.cat([rows for rows, _, _ in data.batches(4, True, seed=3)])
    assert torch.equal(rows, again)
    for rows, embeddings, mask in data.batches(4, True, seed=3):
        assert embeddings.dtype == torch.float32 and torch.equal(embeddings, data.embeddings[rows].float()) and torch.equal(mask, data.mask[rows])
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        next(data.batches(0))


# ---- models that are not there, damaged, or want to run code

def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    "Python code in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def test_import_is_light():
    "transformers loads when an encoder is made, not before."
    assert run("import sys, ddcl_nb.encoders; print([m for m in ('transformers', 'pandas', 'sklearn', 'tokenizers') if m in sys.modules])").stdout.strip() == "[]"


def test_missing_model_names_itself_and_the_offline_alternative():
    done = run("from ddcl_nb.encoders import Encoder; Encoder('nobody/no-such-model')", HF_HUB_OFFLINE="1")
    last = done.stderr.strip().splitlines()[-1]
    for part in ("ModelNotLoaded: model 'nobody/no-such-model' could not be loaded", 'Encoder("offline") needs no network', "ddcl_nb[text,offline]"):
        assert part in last


def test_missing_offline_package(monkeypatch):
    monkeypatch.setattr(encoders, "OFFLINE_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotLoaded, match=r"'offline' is not installed.*ddcl_nb\[text,offline\]"):
        Encoder("offline")


def test_missing_transformers_names_the_extra():
    done = run("import sys; sys.modules['transformers'] = None\nfrom ddcl_nb.encoders import Encoder; Encoder('offline')")
    assert 'ImportError: transformers is not installed and is needed here: pip install "ddcl_nb[text]"' in done.stderr


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_weights(damage, tmp_path):
    weights = save_model(tmp_path, "bert") / "model.safetensors"
    weights.write_bytes({"cut": weights.read_bytes()[:2000], "empty": b"", "foreign": b"<html>" * 100}[damage])
    with pytest.raises(ModelNotLoaded, match="could not be loaded") as caught:
        Encoder(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path):
    weights = save_model(tmp_path, "bert") / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelNotLoaded, match="could not be loaded"):
        Encoder(tmp_path, device="cpu")


def test_remote_code_is_never_run(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open(r'{tmp_path / 'sprung'}', 'w')\n")
    with pytest.raises(ModelNotLoaded):
        Encoder(folder, device="cpu")
    assert not (tmp_path / "sprung").exists()


# ---- the cache

def test_cache_returns_the_same(small, tmp_path):
    texts = sentences(11)
    first, second, without = small.tokens(texts, cache=tmp_path), small.tokens(texts, cache=tmp_path), small.tokens(texts, cache=False)
    assert torch.equal(first.embeddings, second.embeddings) and torch.equal(first.mask, second.mask)
    assert torch.equal(first.embeddings, without.embeddings) and torch.equal(first.mask, without.mask)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["tokens.safetensors"]


def test_cache_hit_computes_nothing(small, tmp_path, monkeypatch):
    small.tokens(sentences(6), cache=tmp_path)
    monkeypatch.setattr(encoders, "embed_ids", lambda *_: pytest.fail("computed again"))
    small.tokens(sentences(6), cache=tmp_path)


def test_cache_folder_of_the_user(small, tmp_path, monkeypatch):
    monkeypatch.setenv("DDCL_CACHE", str(tmp_path))
    small.tokens(["the orbit"])
    assert len(list((tmp_path / "embeddings").glob("*/tokens.safetensors"))) == 1


def test_every_change_is_another_entry(folders, tmp_path):
    "Texts, their order, length, dtypes, and a model that was trained further in the same folder: none may read another's embeddings."
    changed = save_model(tmp_path / "model", "bert", seed=0)
    texts = ["the orbit", "a pole"]

    def entries(encoder, texts=texts, **arguments):
        encoder.tokens(texts, cache=tmp_path / "cache", **arguments)
        return len(list((tmp_path / "cache").iterdir()))
    encoder = Encoder(changed, device="cpu")
    assert entries(encoder) == 1
    assert entries(Encoder(folders["bert"], device="cpu")) == 1
    assert entries(encoder, texts[::-1]) == 2
    assert entries(encoder, ["the orbita pole"]) == 3
    assert entries(encoder, max_length=16) == 4
    assert entries(encoder, keep="float32") == 5
    assert entries(Encoder(changed, device="cpu", dtype="bfloat16")) == 6
    weights = load_file(changed / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] *= 1.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert entries(Encoder(changed, device="cpu")) == 7


def stop_at(monkeypatch, call: int) -> list[int]:
    "Let the `call`-th shard be interrupted (0: none); returns the list of the sizes of the shards that are computed."
    sizes, real = [], encoders.embed_ids

    def embed(model, ids, *rest):
        sizes.append(len(ids))
        if len(sizes) == call:
            raise KeyboardInterrupt
        return real(model, ids, *rest)
    monkeypatch.setattr(encoders, "embed_ids", embed)
    return sizes


def test_interrupted_run_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    texts = sentences(18)
    expected = small.tokens(texts, cache=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        small.tokens(texts, cache=tmp_path)
    names = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    assert names == ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
    sizes = stop_at(monkeypatch, 0)
    resumed = small.tokens(texts, cache=tmp_path)
    assert sizes == [4, 2] and torch.equal(resumed.embeddings, expected.embeddings) and torch.equal(resumed.mask, expected.mask)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_shard_is_made_again(damage, small, tmp_path, monkeypatch):
    texts = sentences(12)
    expected = small.tokens(texts, cache=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        small.tokens(texts, cache=tmp_path)
    shard = next(tmp_path.rglob("shard-00000.safetensors"))
    shard.write_bytes({"cut": shard.read_bytes()[:-10], "empty": b"", "foreign": b"x" * 500}[damage])
    sizes = stop_at(monkeypatch, 0)
    assert torch.equal(small.tokens(texts, cache=tmp_path).embeddings, expected.embeddings) and sizes == [4, 4]


@pytest.mark.parametrize("keep_bytes", [0, 7, 100, -1])
def test_truncated_result_is_made_again(keep_bytes, small, tmp_path):
    texts = sentences(9)
    expected = small.tokens(texts, cache=False)
    small.tokens(texts, cache=tmp_path)
    joined = next(tmp_path.rglob("tokens.safetensors"))
    joined.write_bytes(joined.read_bytes()[:keep_bytes])
    assert torch.equal(small.tokens(texts, cache=tmp_path).embeddings, expected.embeddings)


WORKER = """
import sys, time, torch
from ddcl_nb import encoders
torch.set_num_threads(1)
folder, cache, pause = sys.argv[1:]
real = encoders.embed_ids
def slow(*arguments):
    time.sleep(float(pause))
    return real(*arguments)
encoders.embed_ids = slow
encoder = encoders.Encoder(folder, device="cpu")
encoder.shard_size = 4
texts = ["the orbit decays over the pole"[:number % 25 + 3] for number in range(40)]
print("ready", flush=True)
print(float(encoder.tokens(texts, cache=cache).mean().double().sum()))
"""


def worker(folder: Path, cache: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(cache), str(pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_process(folders, tmp_path):
    "Killed without warning in the middle: a second process takes over what is whole, and ends with the numbers of an undisturbed one."
    first = worker(folders["bert"], tmp_path / "cache", 0.1)
    deadline = time.time() + 60
    while len(list(tmp_path.rglob("shard-*.safetensors"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert 3 <= len(list(tmp_path.rglob("shard-*.safetensors"))) < 10
    second = worker(folders["bert"], tmp_path / "cache", 0)
    output, errors = second.communicate(timeout=120)
    texts = ["the orbit decays over the pole"[:number % 25 + 3] for number in range(40)]
    expected = float(Encoder(folders["bert"], device="cpu").tokens(texts, cache=False).mean().double().sum())
    assert float(output.split()[-1]) == pytest.approx(expected, rel=1e-6), errors


def test_two_processes_do_not_disturb_each_other(folders, tmp_path):
    both = [worker(folders["bert"], tmp_path / "cache", pause) for pause in (0.03, 0.05)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["tokens.safetensors"]


def test_abandoned_temporary_files_are_removed_and_fresh_ones_kept(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        small.tokens(sentences(8), cache=tmp_path)
    folder = next(tmp_path.iterdir())
    old, fresh = folder / ".shard-00001.safetensors.old.part", folder / ".shard-00001.safetensors.new.part"
    old.touch(), fresh.touch()
    os.utime(old, (0, 0))
    small.tokens(sentences(8), cache=tmp_path)
    assert fresh.exists() and not old.exists()


def test_result_is_mapped_and_not_loaded(tmp_path):
    "A file of 256 MB is opened, and one row read, in a process that may not grow by that much."
    resource = pytest.importorskip("resource")
    assert resource
    shards = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for shard in shards:
        save_file({"embeddings": torch.ones(250, 128, 1024, dtype=torch.float16), "mask": torch.ones(250, 128, dtype=torch.bool)}, shard)
    encoders.join_shards(shards, tmp_path / "joined.safetensors", (1000, 128, 1024), torch.float16)
    done = run(f"""
import resource
from safetensors.torch import load_file
from ddcl_nb.encoders import TokenEmbeddings
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = load_file(r"{tmp_path / 'joined.safetensors'}")
assert TokenEmbeddings(kept["embeddings"], kept["mask"])[[500]].mean().eq(1).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
""")
    assert float(done.stdout) < 60, done.stderr


def test_quiet_without_a_terminal(small, capfd, tmp_path):
    small.tokens(sentences(9), cache=tmp_path)
    assert capfd.readouterr() == ("", "")
