"Adapters: every kind of encoder, padding on either side, precision, foreign and damaged files, Trainer and the trainer of sentence-transformers."
import copy
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra text")
pytest.importorskip("sentence_transformers", reason="needs the extra text")

from sentence_transformers import SentenceTransformer  # noqa: E402
from transformers import (AutoModel, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, PrinterCallback,  # noqa: E402
                          RobertaConfig, T5Config, Trainer, TrainingArguments, ViTConfig)

from ddcl_nb.adapters import (DDCLConfig, DDCLForSequenceClassification, DDCLModel, DDCLPooling, PatchTokens, PrototypeLoss, TemperatureCallback,  # noqa: E402
                              init_prototypes, load_sentence_transformer, two_rate_optimizer)
from ddcl_nb.encoders import ModelNotLoaded, offline_model  # noqa: E402
from ddcl_nb.temperature import Anneal  # noqa: E402
from ddcl_nb.training import banks  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pad = torch.nn.functional.pad
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
KINDS = {"bert": BertConfig(vocab_size=100, max_position_embeddings=40, **small),
         "roberta": RobertaConfig(vocab_size=100, max_position_embeddings=40, **small),
         "distilbert": DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40),
         "gpt2": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=1),
         "llama": LlamaConfig(vocab_size=100, num_key_value_heads=2, max_position_embeddings=40, **small),
         "t5": T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)}


def encoder(kind="bert", seed=0):
    torch.manual_seed(seed)
    return AutoModel.from_config(KINDS[kind]).eval()


def classifier(kind="bert", **settings):
    given = encoder(kind)
    return DDCLForSequenceClassification.from_encoder(given, **{"n_prototypes": 4, "prototype_temperature": 2.0, "num_labels": 3} | settings).eval()


def ids(*shape, seed=0):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


# ---- any encoder

@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_nothing(kind, heads):
    model, x = classifier(kind, n_heads=heads, pool="histogram"), ids(2, 6)
    filler = 1 if kind == "roberta" else 0
    with torch.no_grad():
        alone, right, left = (model(pad(x, p, value=filler), attention_mask=pad(torch.ones_like(x), p), labels=torch.tensor([0, 2])) for p in ((0, 0), (0, 5), (5, 0)))
    for padded, kept in ((right, slice(0, 6)), (left, slice(5, 11))):
        torch.testing.assert_close(padded.logits, alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded.loss, alone.loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded.assignments[..., kept, :], alone.assignments, atol=1e-5, rtol=1e-5)
        assert (padded.indices != -1).sum() == (alone.indices != -1).sum() == heads * 12
        assert padded.assignments.sum() == pytest.approx(heads * 12, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_keeps_its_weights_and_comes_back_from_the_folder(kind, tmp_path):
    given = encoder(kind)
    before = {name: t.clone() for name, t in (given.get_encoder() if kind == "t5" else given).state_dict().items()}
    model = DDCLForSequenceClassification.from_encoder(given, n_prototypes=4, num_labels=3, prototype_temperature=2.0).eval()
    kept = model.ddcl.encoder.state_dict()
    assert kept and all(torch.equal(before[name], t) for name, t in kept.items())
    model.save_pretrained(tmp_path)
    again, bare = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(again) is DDCLForSequenceClassification and type(bare) is DDCLModel
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with torch.no_grad():
        assert torch.equal(again(ids(2, 6)).logits, model(ids(2, 6)).logits)
        assert torch.equal(bare(ids(2, 6)).summary, model(ids(2, 6)).summary)


def test_a_folder_a_path_and_a_task_model_are_encoders_too(tmp_path):
    given = transformers.AutoModelForMaskedLM.from_config(KINDS["bert"]).eval()
    given.save_pretrained(tmp_path)
    models = [DDCLModel.from_encoder(e, n_prototypes=2, prototype_temperature=1.0).eval() for e in (given, tmp_path, str(tmp_path))]
    hidden = [m(ids(1, 5)).last_hidden_state for m in models]
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    assert str(tmp_path) not in models[1].config.to_json_string()


def test_images_go_through_the_same_path(tmp_path):
    torch.manual_seed(0)
    vit = AutoModel.from_config(ViTConfig(image_size=32, patch_size=8, **small))
    model = DDCLForSequenceClassification.from_encoder(vit, n_prototypes=3, num_labels=10, prototype_temperature=1.0).eval()
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    found, again = model(pixel_values=images, labels=torch.tensor([1, 9])), AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert found.assignments.shape == (2, 17, 3) and found.loss.isfinite() and model.main_input_name == "pixel_values"
    torch.testing.assert_close(again(pixel_values=images).logits, found.logits)


# ---- inputs

def test_inputs_embeds_one_text_and_more_prototypes_than_tokens():
    model, x = classifier(n_prototypes=9), ids(3, 4)
    with torch.no_grad():
        whole = model(x, attention_mask=torch.ones_like(x))
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, whole.logits)
        torch.testing.assert_close(model(x[1:2]).logits, whole.logits[1:2])
    assert whole.assignments.shape == (3, 4, 9)
    with pytest.raises(ValueError, match="n_prototypes"):
        init_prototypes(model, {"input_ids": x[:1]})


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_row_without_tokens_is_zero_and_harms_nothing(kind):
    model, x = classifier(kind, anchors={"variance_floor": 1.0}).train(), ids(3, 5)
    mask = torch.tensor([[1] * 5, [0] * 5, [0, 0, 1, 1, 1]])
    found = model(x, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    found.loss.backward()
    assert found.summary[1].abs().sum() == 0 and found.assignments[1].sum() == 0 and (found.indices[1] == -1).all()
    assert found.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model(x, attention_mask=torch.zeros_like(x), labels=torch.tensor([0, 1, 2])).loss.backward()


def test_outputs_as_asked():
    model = classifier()
    found = model(ids(2, 5), output_hidden_states=True)
    assert found.loss is None and len(found.hidden_states) == 3 and found.hidden_states[-1].shape == (2, 5, 32)
    as_tuple = model(ids(2, 5), labels=torch.tensor([0, 1]), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[1].shape == (2, 3)


@pytest.mark.parametrize("settings, labels", [({"num_labels": 1}, torch.tensor([0.3, -1.0])), ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 1]]))])
def test_regression_and_several_labels(settings, labels):
    assert classifier(**settings)(ids(2, 5), labels=labels).loss.isfinite()


def test_a_mask_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 5\), one number a token, got \(2, 1, 5, 5\)"):
        classifier()(ids(2, 5), attention_mask=torch.ones(2, 1, 5, 5))


# ---- precision and memory

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_readout_whole(dtype, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    half, exact = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype), model(ids(2, 6)).logits
    assert half.ddcl.encoder.dtype == dtype and {t.dtype for t in half.ddcl.readout.state_dict().values()} == {torch.float32, torch.bool}
    cast = copy.deepcopy(model).to(dtype)
    with torch.autocast("cpu", dtype):
        found = [half(ids(2, 6)).logits, cast(ids(2, 6)).logits, model(ids(2, 6)).logits]
    for logits in (*found, half(ids(2, 6)).logits, cast(ids(2, 6)).logits):
        torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(model):
        model.train()
        torch.manual_seed(0)
        model(ids(4, 6), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return [p.grad for p in model.parameters()]
    plain, saving = classifier(), classifier()
    saving.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.ddcl.encoder.modules())
    for a, b in zip(gradients(plain), gradients(saving)):
        torch.testing.assert_close(a, b)


# ---- files

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    classifier().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    "A copy that a test may damage."
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(n_prototypes=-2), "n_prototypes must be a positive integer, got -2"),
    (lambda c: c.update(n_prototypes="4"), "n_prototypes must be a positive integer, got '4'"),
    (lambda c: c.update(tau=float("inf")), "tau must be positive and finite"),
    (lambda c: c.update(tau=True), "tau must be positive and finite, got True"),
    (lambda c: c.update(anchors={"reconstruction": 1.0}), "reconstruction needs a decoder"),
    (lambda c: c.update(anchors={"gravity": 1.0}), "anchors must be among"),
    (lambda c: c.update(n_prototype=3), "has no setting 'n_prototype'"),
    (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), "names code"),
    (lambda c: c["encoder"].update(auto_map={"AutoModel": "evil.Model"}), "names code"),
    (lambda c: c["encoder"].update(model_type="evil"), "encoder must be a configuration with a model_type"),
    (lambda c: c["encoder"].update(model_type="ddcl"), "encoder must be a configuration with a model_type"),
    (lambda c: c.update(encoder=[1]), "encoder must be a configuration with a model_type"),
    (lambda c: c.pop("encoder"), "config.encoder is None")])
def test_a_configuration_is_checked_when_it_is_read(folder, change, message):
    edit(folder / "config.json", change)
    with pytest.raises(ValueError, match=message):
        DDCLForSequenceClassification.from_pretrained(folder)


def test_pickles_remote_code_and_damaged_weights_are_refused(folder):
    for settings in ({"trust_remote_code": True}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match="never loaded"):
            DDCLModel.from_pretrained(folder, **settings)
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        classifier().save_pretrained(folder, safe_serialization=False)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(Exception, match="(?i)safetensors|incomplete|header"):
        DDCLModel.from_pretrained(folder)
    weights.unlink()
    torch.save(classifier().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        DDCLModel.from_pretrained(folder)
    with pytest.raises(ModelNotLoaded):
        DDCLModel.from_encoder(folder)


def test_missing_weights_are_not_filled_with_random_ones(folder):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in weights.items() if "prototypes" not in name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, ddcl.readout.bank.prototypes among them"):
        DDCLForSequenceClassification.from_pretrained(folder)


def test_a_foreign_folder_is_no_ddcl_model(tmp_path):
    encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDCLConfig has no setting|config.encoder is None"):
        DDCLModel.from_pretrained(tmp_path)


FRESH = """
import sys, torch, numpy as np
from transformers import AutoModelForSequenceClassification
import ddcl_nb.adapters as a
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
torch.manual_seed(0)
np.save(sys.argv[2], model(torch.arange(12).reshape(2, 6)).logits.detach().numpy())
"""


def test_a_fresh_process_without_network_gives_the_same_numbers(saved, tmp_path):
    done = subprocess.run([sys.executable, "-c", FRESH, saved, tmp_path / "logits.npy"], capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    expected = DDCLForSequenceClassification.from_pretrained(saved)(torch.arange(12).reshape(2, 6)).logits.detach().numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


@pytest.mark.parametrize("package", ["transformers", "sentence_transformers"])
def test_a_missing_extra_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "ddcl_nb.adapters")
    with pytest.raises(ImportError, match=rf'{package} is not installed and is needed here: pip install "ddcl_nb\[text\]"'):
        importlib.import_module("ddcl_nb.adapters")


# ---- Trainer

def rows(n, seed=0):
    "Token numbers with label 1 where they are from the upper half of the vocabulary."
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1 + 50 * y, 50 + 50 * y, rng.integers(3, 9)).tolist(), "labels": int(y)} for y in rng.integers(0, 2, n)]


def collate(found):
    length = max(len(row["input_ids"]) for row in found)
    x = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in found])
    return {"input_ids": x, "attention_mask": (x > 0).long(), "labels": torch.tensor([row["labels"] for row in found])}


def trainer(folder, model, data, ratio=10.0, **settings):
    args = TrainingArguments(str(folder), **dict(max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, weight_decay=0.1, report_to="none", disable_tqdm=True,
                                                 use_cpu=True, save_strategy="no", logging_steps=1) | settings)
    made = Trainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collate, compute_metrics=lambda p: {"shape": p.predictions.shape},
                   optimizers=(two_rate_optimizer(model, args, ratio), None), callbacks=[TemperatureCallback(Anneal(0.8, 0.1))])
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"bf16": True, "gradient_checkpointing": True}])
def test_trainer_in_every_mode(settings, tmp_path):
    model = init_prototypes(classifier(num_labels=2, prototype_temperature=None, n_heads=2, anchors={"variance_floor": 0.1, "repulsion": 1e-3}), collate(rows(32)))
    before = copy.deepcopy(model.state_dict())
    made = trainer(tmp_path, model, rows(32), **settings)
    made.train()
    assert made.evaluate()["eval_shape"] == (32, 2)
    log = [row for row in made.state.log_history if "loss" in row]
    assert [round(row["tau"], 3) for row in log] == [round(Anneal(0.8, 0.1, 4)(step), 3) for step in range(4)]
    assert all(np.isfinite(row["loss"]) and row["critical"] > 0 and row["separation_min"] > 0 for row in log)
    assert float(banks(model)["ddcl.readout.bank"].tau.max()) == pytest.approx(0.1)
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert {"ddcl.readout.bank.prototypes", "classifier.weight", "ddcl.encoder.embeddings.word_embeddings.weight"} <= set(changed)


def test_accumulated_batches_are_one_batch(tmp_path):
    "The loss of the task is a mean, so two batches of eight equal one of sixteen, where dropout is off."
    data = [{"input_ids": row["input_ids"][:3], "labels": row["labels"]} for row in rows(16)]
    gradients = []
    for size in (16, 8):
        model = classifier(num_labels=2, prototype_weight=0.0)
        model.config.encoder.hidden_dropout_prob = 0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout): module.p = 0.0
        model.ddcl.encoder.config._attn_implementation = "eager"
        made = trainer(tmp_path, model, data, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, max_steps=1, max_grad_norm=1e9)
        banks(model)["ddcl.readout.bank"].calibrate(model(collate(data)["input_ids"]).last_hidden_state)
        made.remove_callback(TemperatureCallback)
        banks(model)["ddcl.readout.bank"].momentum = 0.0
        made.train()
        gradients.append([row["grad_norm"] for row in made.state.log_history if "grad_norm" in row][0])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3)


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    model = classifier(num_labels=2)
    model.ddcl.encoder.requires_grad_(False)
    before = copy.deepcopy(model.ddcl.encoder.state_dict())
    made = trainer(tmp_path, model, rows(16))
    assert {id(p) for group in made.optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    made.train()
    assert all(torch.equal(t, before[name]) for name, t in model.ddcl.encoder.state_dict().items())


def test_two_readouts_may_share_an_encoder(tmp_path):
    given = encoder()
    a, b = (DDCLForSequenceClassification.from_encoder(given, n_prototypes=k, prototype_temperature=1.0).eval() for k in (2, 3))
    assert a.ddcl.encoder is b.ddcl.encoder
    b.save_pretrained(tmp_path)
    torch.testing.assert_close(DDCLForSequenceClassification.from_pretrained(tmp_path)(ids(2, 4)).logits, b(ids(2, 4)).logits)


def test_rates_and_decay_of_the_groups():
    model = classifier()
    args = TrainingArguments("unused", learning_rate=2e-3, weight_decay=0.1, adam_beta2=0.9, report_to="none", use_cpu=True)
    groups = two_rate_optimizer(model, args, ratio=5).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in groups] == [
        ("others", 2e-3, 0.1, (0.9, 0.9)), ("others", 2e-3, 0.0, (0.9, 0.9)), ("prototypes", 1e-2, 0.0, (0.9, 0.9))]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="ratio must be positive"):
        two_rate_optimizer(model, args, ratio=0)


def test_a_resumed_run_of_a_decoder_ends_at_the_same_numbers(tmp_path):
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = init_prototypes(classifier("gpt2", num_labels=2, prototype_temperature=None), collate(rows(32)))
        made = trainer(tmp_path, model, rows(32), max_steps=6, save_strategy="steps", save_steps=3)
        made.train(resume_from_checkpoint=checkpoint)
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends)))


# ---- sentence-transformers

TEXTS = ["The rover landed on Mars.", "A new telescope sees far galaxies, and then some more of them.", "The goalkeeper saved the penalty.", "They won.", "", "Rain"]


@pytest.fixture(scope="module")
def words():
    if offline_model() is None: pytest.skip("needs the extra offline")
    from sentence_transformers.sentence_transformer.modules import Transformer
    return Transformer(str(offline_model()))


def sentence_model(words, **settings):
    pooling = DDCLPooling(384, **{"n_prototypes": 6} | settings)
    return init_prototypes(SentenceTransformer(modules=[copy.deepcopy(words), pooling], device="cpu"), TEXTS)


@pytest.mark.parametrize("pool, heads, width", [("histogram", 1, 6), ("histogram", 3, 18), ("centroid", 2, 384), ("residual", 1, 6 * 384)])
def test_pooling_saves_loads_and_ignores_padding(words, pool, heads, width, tmp_path):
    model = sentence_model(words, pool=pool, n_heads=heads)
    model[1].readout.bank.prototypes.data += 0.1 * torch.randn(6, 384 // heads)  # off the few tokens they were placed on, where a residual is rounding
    together = model.encode(TEXTS)
    assert together.shape == (6, width) and model.get_embedding_dimension() == width
    np.testing.assert_allclose(np.stack([model.encode(text) for text in TEXTS]), together, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    np.testing.assert_array_equal(load_sentence_transformer(tmp_path, device="cpu").encode(TEXTS), together)
    rows = model.encode(TEXTS, output_value=None)
    assert all(row["assignments"].shape == (*((heads,) if heads > 1 else ()), len(rows[0]["input_ids"]), 6) for row in rows)


def test_prompts_flat_batches_and_padding_on_the_left(words):
    pooling = sentence_model(words, include_prompt=False)[1].eval()
    tokens = torch.randn(2, 5, 384)
    whole = lambda mask, **more: pooling({"token_embeddings": tokens, "attention_mask": torch.tensor(mask), **more})["sentence_embedding"]
    right = whole([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], prompt_length=torch.tensor([2]))
    torch.testing.assert_close(right, whole([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]))
    torch.testing.assert_close(whole([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], prompt_length=3), whole([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]))
    flat = pooling({"token_embeddings": tokens.reshape(1, 10, 384)[:, :8], "cu_seq_lens_q": torch.tensor([0, 5, 8])})["sentence_embedding"]
    torch.testing.assert_close(flat, whole([[1] * 5, [1, 1, 1, 0, 0]]))
    torch.testing.assert_close(pooling({"token_embeddings": tokens})["sentence_embedding"], whole([[1] * 5] * 2))


def test_half_precision_pooling(words):  # the residual would turn rounding into directions where a token is on its prototype
    model = sentence_model(words, pool="centroid")
    exact = model.encode(TEXTS)
    np.testing.assert_allclose(model.bfloat16().encode(TEXTS, convert_to_tensor=True).float().numpy(), exact, atol=0.05)


@pytest.mark.parametrize("wrong, message", [({"n_prototypes": 0}, "n_prototypes"), ({"pool": "mean"}, "pool"), ({"tau": -1}, "tau"), ({"temperature": "hot"}, "prototype_temperature|temperature"),
                                            ({"embedding_dimension": 0}, "dim"), ({"n_heads": 5}, "n_heads")])
def test_wrong_settings_of_pooling(wrong, message):
    with pytest.raises(ValueError, match=message):
        DDCLPooling(**{"embedding_dimension": 32} | wrong)


@pytest.fixture(scope="module")
def saved_sentences(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    sentence_model(words).save_pretrained(str(folder))
    return folder


@pytest.fixture
def sentences(saved_sentences, tmp_path):
    "The same, of links to all but what a test may damage."
    for path in saved_sentences.rglob("*"):
        target = tmp_path / path.relative_to(saved_sentences)
        if path.is_dir(): target.mkdir()
        elif path.stat().st_size > 1e6: target.symlink_to(path)
        else: target.write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("file, change, message", [
    ("modules.json", lambda c: c[1].update(type="os.system"), "names code"),
    ("modules.json", lambda c: c[1].update(type="sentence_transformers.SentenceTransformer"), "names code"),
    ("modules.json", lambda c: c[1].update(type="sentence_transformers.util.http_get"), "names code"),
    ("modules.json", lambda c: c[1].update(path="../elsewhere"), "outside its folder"),
    ("modules.json", lambda c: c[1].update(path="/etc"), "outside its folder"),
    ("modules.json", lambda c: c[1].pop("type"), "missing or is not that of a SentenceTransformer"),
    ("1_DDCLPooling/config.json", lambda c: c.update(n_prototypes=0), "n_prototypes"),
    ("1_DDCLPooling/config.json", lambda c: c.update(n_prototypes=7), "damaged, or of another module"),
    ("1_DDCLPooling/config.json", lambda c: c.update(evil=1), "has a setting that DDCLPooling has not: 'evil'"),
    ("1_DDCLPooling/config.json", lambda c: c.update(auto_map={"a": "b"}), "names code"),
    ("1_DDCLPooling/config.json", lambda c: c.clear(), "missing or is not that of a DDCLPooling")])
def test_a_saved_sentence_model_is_checked(sentences, file, change, message):
    edit(sentences / file, change)
    with pytest.raises(ValueError, match=message):
        load_sentence_transformer(sentences)


def test_damaged_weights_and_pickles_of_pooling(sentences):
    weights = sentences / "1_DDCLPooling" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ValueError, match="model.safetensors of .*1_DDCLPooling is damaged"):
        load_sentence_transformer(sentences)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="pickle"):
        load_sentence_transformer(sentences)
    with pytest.raises(ValueError, match="pickles are not read"):
        DDCLPooling.load(str(sentences), "1_DDCLPooling")
    (sentences / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json of .* is not JSON"):
        load_sentence_transformer(sentences)
    with pytest.raises(ValueError, match="trust_remote_code must be False"):
        load_sentence_transformer(sentences, trust_remote_code=True)
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        DDCLPooling(8, 2).save(str(sentences), safe_serialization=False)


def test_sentences_that_are_none():
    for data in ("a text", [], [1, 2]):
        with pytest.raises(ValueError, match="data must be a list of one or more sentences"):
            init_prototypes(SentenceTransformer(modules=[DDCLPooling(8, 2)], device="cpu"), data)


def test_the_trainer_of_sentence_transformers(words, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the trainer of sentence-transformers needs datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    data = datasets.Dataset.from_dict({"anchor": TEXTS[:4] * 4, "positive": TEXTS[:4][::-1] * 4})
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = sentence_model(words)
        model[0].requires_grad_(False)
        args = SentenceTransformerTrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True,
                                                    save_strategy="steps", save_steps=2, logging_steps=1)
        loss = PrototypeLoss(MultipleNegativesRankingLoss(model), weight=0.5, anchors={"repulsion": 1e-3})
        made = SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss, optimizers=(two_rate_optimizer(model, args), None), callbacks=[TemperatureCallback(Anneal(0.5, 0.1))])
        made.remove_callback(PrinterCallback)
        made.train(resume_from_checkpoint=checkpoint)
        ends.append(copy.deepcopy(model[1].state_dict()))
        assert [row["tau"] for row in made.state.log_history if "loss" in row][-1] == pytest.approx(Anneal(0.5, 0.1, 4)(3))
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends)))


def test_losses_without_prototypes_or_without_gradients(words):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling
    bare = SentenceTransformer(modules=[words, Pooling(384)], device="cpu")
    with pytest.raises(ValueError, match="without prototypes"):
        PrototypeLoss(MultipleNegativesRankingLoss(bare))
    model = sentence_model(words)
    features = [model.preprocess(TEXTS[:2]), model.preprocess(TEXTS[2:4])]
    with pytest.raises(ValueError, match="calls the model without gradients"):
        PrototypeLoss(CachedMultipleNegativesRankingLoss(model))(features, None)


# ---- torchvision

def test_patches_of_a_vision_transformer():
    vision = pytest.importorskip("torchvision.models", reason="needs the extra vision")
    torch.manual_seed(0)
    vit = vision.VisionTransformer(image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    patches = PatchTokens(vit)
    patches(torch.randn(2, 3, 32, 32)).sum().backward()
    assert vit.conv_proj.weight.grad.abs().sum() > 0, "weights are shared"
    assert patches.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 4, 8) and PatchTokens(vit, class_token=True)(torch.randn(2, 3, 32, 32)).shape == (2, 5, 8)
    with pytest.raises(TypeError, match="vit must be a torchvision.models.VisionTransformer, got Linear"):
        PatchTokens(torch.nn.Linear(2, 2))
