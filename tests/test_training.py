"Training that is interrupted, killed, poisoned or falsified, and the diagnostics that it writes."
import json
import math
import random
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from ddcl_nb import losses, training
from ddcl_nb.assign import NonFiniteInput, decompose
from ddcl_nb.bank import PrototypeBank
from ddcl_nb.layers import DDCLAttention, DDCLReadout
from ddcl_nb.storage import StateError
from ddcl_nb.temperature import Anneal
from ddcl_nb.training import (DecompositionError, Diagnostics, NonFiniteLoss, bank_loss, banks, fit, initialise, param_groups)

TOKENS = torch.randn(24, 5, 6, generator=torch.Generator().manual_seed(0))
KEEP = torch.arange(5) < torch.randint(1, 6, (24, 1), generator=torch.Generator().manual_seed(1))
SETTINGS = dict(epochs=5, batch_size=7, anneal=Anneal(0.9, 0.05), seed=3, init="random")


class Net(nn.Module):
    "Dropout, so that the random state matters, batch statistics, and two heads."

    def __init__(self, n_heads=2):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
        self.norm = nn.BatchNorm1d(6)
        self.layer = DDCLAttention(6, 3, n_heads=n_heads)

    def forward(self, tokens, mask=None):
        return self.layer(self.norm(self.encode(tokens).mT).mT, mask)


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)


def same(one, other):
    "Every parameter and buffer equal to the last bit."
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def sound(found, epochs=5):
    "Every epoch is there, every number in it finite, and the decomposition held to the last."
    finite = all(math.isfinite(value) for row in found.history for value in row.values())
    return len(found.history) == epochs and finite and found.last["gap"] < 1e-12


def break_at(call):
    "A loss that is interrupted in the middle of training, at its `call`-th step."
    done = []

    def loss(model, *batch):
        if model.training:
            done.append(None)
            if len(done) == call:
                raise KeyboardInterrupt
        return bank_loss(model, *batch)
    return loss


class Noisy(Dataset):
    "Items augmented with NumPy's global random numbers."

    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, i):
        return TOKENS[i] + torch.from_numpy(np.random.randn(5, 6)).float()


def random_sampler():
    return RandomSampler(range(len(TOKENS)), generator=torch.Generator().manual_seed(5))


DATA = {
    "tensor": lambda: TOKENS,
    "tokens and mask": lambda: (TOKENS, KEEP),
    "dataset": lambda: TensorDataset(TOKENS, KEEP),
    "loader": lambda: DataLoader(TensorDataset(TOKENS, KEEP), 7, shuffle=True),
    "loader with a generator": lambda: DataLoader(TensorDataset(TOKENS, KEEP), 7, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "loader with a sampler": lambda: DataLoader(TensorDataset(TOKENS, KEEP), 7, sampler=random_sampler()),
    "loader with a batch sampler": lambda: DataLoader(TensorDataset(TOKENS, KEEP), batch_sampler=BatchSampler(random_sampler(), 7, False)),
    "loader with a worker": lambda: DataLoader(TensorDataset(TOKENS, KEEP), 7, shuffle=True, num_workers=1),
    "dataset with noise": Noisy,
    "batches": lambda: [(t, k) for t, k in zip(TOKENS.split(7), KEEP.split(7))],
}
OPTIMISERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "rmsprop": torch.optim.RMSprop,
}


def interrupted_and_resumed(path, data, call, **settings):
    with pytest.raises(KeyboardInterrupt):
        fit(net(), DATA[data](), checkpoint=path, loss=break_at(call), **settings)
    torch.manual_seed(999)
    again = Net()  # weights that the checkpoint must replace
    return again, fit(again, DATA[data](), checkpoint=path, **settings)


# --- resuming

@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("call, done", [(5, 1), (11, 2), (20, 4)])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, data, call, done):
    whole = net()
    expected = fit(whole, DATA[data](), **SETTINGS)
    again, found = interrupted_and_resumed(tmp_path / "run", data, call, **SETTINGS)
    assert found.resumed_from == done and found.history == expected.history and same(again, whole)
    assert [row["epoch"] for row in found.history] == [1, 2, 3, 4, 5]


def test_a_run_broken_in_its_first_epoch_has_no_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(net(), TOKENS, checkpoint=tmp_path / "run", loss=break_at(2), **SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_resumes(tmp_path, optimiser):
    settings = SETTINGS | dict(optimiser=OPTIMISERS[optimiser], lr=1e-2)
    whole = net()
    expected = fit(whole, DATA["tokens and mask"](), **settings)
    again, found = interrupted_and_resumed(tmp_path / "run", "tokens and mask", 10, **settings)
    assert found.resumed_from == 2 and found.history == expected.history and same(again, whole)


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    first = net()
    expected = fit(first, TOKENS, checkpoint=tmp_path / "run", **SETTINGS)
    again = Net()
    found = fit(again, TOKENS, checkpoint=tmp_path / "run", loss=break_at(1), **SETTINGS)
    assert found.history == expected.history and found.resumed_from == 5 and same(again, first) and not again.training


@pytest.mark.parametrize("name, value", [("seed", np.int64(3)), ("epochs", np.int64(5)), ("lr", np.float64(1e-3))])
def test_numbers_of_numpy_make_the_same_plan(tmp_path, name, value):
    first, again = net(), Net()
    expected = fit(first, TOKENS, checkpoint=tmp_path / "run", **(SETTINGS | {name: value}))
    found = fit(again, TOKENS, checkpoint=tmp_path / "run", **SETTINGS)
    assert found.resumed_from == 5 and found.history == expected.history and same(again, first)


def test_rates_that_are_tensors_can_be_kept(tmp_path):
    def optimiser(groups):
        return torch.optim.Adam([group | {"lr": torch.tensor(group["lr"])} for group in groups])
    first, again = net(), Net()
    expected = fit(first, TOKENS, checkpoint=tmp_path / "run", optimiser=optimiser, **SETTINGS)
    found = fit(again, TOKENS, checkpoint=tmp_path / "run", optimiser=optimiser, **SETTINGS)
    assert sound(expected) and found.resumed_from == 5 and found.history == expected.history and same(again, first)


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5), np.int64(3)])
def test_columns_of_an_evaluation_are_kept_as_plain_numbers(tmp_path, value):
    expected = fit(net(), TOKENS, checkpoint=tmp_path / "run", evaluate=lambda model: {"score": value}, **SETTINGS)
    found = fit(net(), TOKENS, checkpoint=tmp_path / "run", **SETTINGS)
    assert found.resumed_from == 5 and found.history == expected.history
    assert expected.last["score"] == value.item() and type(expected.last["score"]) in (int, float)


def test_resuming_can_be_declined(tmp_path):
    fit(net(), TOKENS, checkpoint=tmp_path / "run", **SETTINGS)
    assert fit(net(), TOKENS, checkpoint=tmp_path / "run", resume=False, **SETTINGS).resumed_from == 0


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_training as t
from ddcl_nb import storage, training

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(model, *batch, calls=[]):
    calls.append(None)
    return kill() if model.training and len(calls) > 11 else training.bank_loss(model, *batch)

if sys.argv[3] == "step":
    t.fit(t.net(), t.TOKENS, checkpoint=sys.argv[2], loss=at_step, **t.SETTINGS)
else:
    replace = os.replace
    storage.os.replace = lambda *paths, calls=[]: calls.append(None) or (kill() if len(calls) == 3 else replace(*paths))
    t.fit(t.net(), t.TOKENS, checkpoint=sys.argv[2], **t.SETTINGS)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["step", "write"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, moment):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "run"), moment],
                            capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, again = net(), Net()
    expected = fit(whole, TOKENS, **SETTINGS)
    found = fit(again, TOKENS, checkpoint=tmp_path / "run", **SETTINGS)
    assert 1 <= found.resumed_from <= 3 and len(found.history) == 5
    for row, wanted in zip(found.history, expected.history):
        assert row == pytest.approx(wanted, rel=1e-5)
    for a, b in zip(again.state_dict().values(), whole.state_dict().values()):
        torch.testing.assert_close(a, b)


# --- checkpoints that do not fit

@pytest.fixture
def checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(net(), TOKENS, checkpoint=tmp_path / "run", loss=break_at(10), **SETTINGS)
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_named_and_not_overwritten(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    before, model = checkpoint.read_bytes(), net()
    with pytest.raises(StateError, match="run is not a state of ddcl_nb, or is damaged"):
        fit(model, TOKENS, checkpoint=checkpoint, **SETTINGS)
    assert checkpoint.read_bytes() == before and same(model, net())


@pytest.mark.parametrize("other", [lambda: Net(n_heads=1), lambda: DDCLAttention(6, 4), lambda: PrototypeBank(3, 6)])
def test_a_checkpoint_of_another_model_is_named_and_nothing_is_touched(checkpoint, other):
    torch.manual_seed(5)  # weights other than those of the checkpoint
    before, model = checkpoint.read_bytes(), other()
    untouched = deepcopy(model)
    with pytest.raises(StateError, match="run is a checkpoint of another model"):
        fit(model, TOKENS, checkpoint=checkpoint, **SETTINGS)
    assert checkpoint.read_bytes() == before and same(model, untouched)


@pytest.mark.parametrize("first, other", [("adam", "sgd"), ("adam", "momentum"), ("adam", "adamw"), ("adam", "rmsprop"), ("sgd", "adam"), ("momentum", "adam")])
def test_a_checkpoint_of_another_optimiser_is_named_and_nothing_is_touched(tmp_path, first, other):
    path, model = tmp_path / "run", net()
    fit(net(), TOKENS, checkpoint=path, optimiser=OPTIMISERS[first], **SETTINGS)
    before = path.read_bytes()
    with pytest.raises(StateError, match="run was made with optimiser='.*', this run has optimiser='.*'; use resume=False"):
        fit(model, TOKENS, checkpoint=path, optimiser=OPTIMISERS[other], **SETTINGS)
    assert path.read_bytes() == before and same(model, net())


@pytest.mark.parametrize("change", [dict(epochs=6), dict(lr=2e-3), dict(ratio=5.0), dict(seed=4), dict(batch_size=8), dict(clip=2.0), dict(init="kmeans"),
                                    dict(anneal=Anneal(0.9, 0.06)), dict(anneal=None), dict(anneal=None, temperature=Anneal(2.0, 1.0))])
def test_a_checkpoint_of_another_plan_is_named(checkpoint, change):
    name = next(iter(change))
    with pytest.raises(StateError, match=f"run was made with {name}=.*use resume=False or another path"):
        fit(net(), TOKENS, checkpoint=checkpoint, **(SETTINGS | change))


def test_a_state_that_is_no_checkpoint_is_named(tmp_path):
    from ddcl_nb.storage import save_state
    save_state(tmp_path / "run", {"x": torch.ones(2)}, {"plan": {}})
    with pytest.raises(StateError, match="run is not a checkpoint of fit"):
        fit(net(), TOKENS, checkpoint=tmp_path / "run", **SETTINGS)


# --- numbers that are not

class Poisoned:
    "Clean batches, but for one in one epoch."

    def __init__(self, epoch, value=float("nan")):
        self.epoch, self.value, self.passes = epoch, value, -1  # the first pass is the initialisation

    def __iter__(self):
        self.passes += 1
        for i, tokens in enumerate(TOKENS.split(7)):
            yield tokens.index_fill(0, torch.tensor(2), self.value) if (self.passes, i) == (self.epoch, 2) else tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_later_batch_takes_the_model_back_to_the_last_good_epoch(tmp_path, value):
    settings = SETTINGS | dict(anneal=None)
    good, poisoned = net(), net()
    expected = fit(good, Poisoned(99), **(settings | dict(epochs=2)))
    with pytest.raises(NonFiniteLoss, match="epoch 3, tokens hold .* NaN or infinite .* back at the end of epoch 2") as caught:
        fit(poisoned, Poisoned(3, value), checkpoint=tmp_path / "run", **settings)
    assert caught.value.history == expected.history and same(poisoned, good)
    whole, again = net(), Net()
    fit(whole, Poisoned(99), **settings)
    assert fit(again, Poisoned(99), checkpoint=tmp_path / "run", **settings).resumed_from == 2 and same(again, whole)


@pytest.mark.parametrize("factor, message", [(float("nan"), "step 1: the loss is nan"), (float("inf"), "step 1: the loss is inf")])
def test_a_loss_that_is_no_number_is_named(factor, message):
    model = net()
    with pytest.raises(NonFiniteLoss, match=f"epoch 1, {message}.*back at the end of epoch 0"):
        fit(model, TOKENS, loss=lambda model, *batch: factor * bank_loss(model, *batch), **(SETTINGS | dict(init=None)))
    assert same(model, net())


def test_a_gradient_that_is_no_number_is_named():
    def loss(model, tokens):
        return bank_loss(model, tokens) + (model.encode[0].weight - model.encode[0].weight.detach()).sum().abs().sqrt()  # slope 0 * inf at 0
    with pytest.raises(NonFiniteLoss, match="the norm of its gradient nan"):
        fit(net(), TOKENS, loss=loss, **SETTINGS)


def test_nan_at_the_start_is_named_before_anything_is_trained():
    with pytest.raises(NonFiniteInput, match="tokens hold"):
        fit(DDCLAttention(6, 3), TOKENS.index_fill(0, torch.tensor(3), float("nan")), epochs=2)


# --- the decomposition is watched

def falsified(field, amount):
    def forward(self, *args, **kwargs):
        out = ORIGINAL(self, *args, **kwargs)
        return out._replace(**{field: getattr(out, field) * (1 + amount)})
    return forward


ORIGINAL = PrototypeBank.forward


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_falsified_loss_stops_training(monkeypatch, n_heads):
    monkeypatch.setattr(PrototypeBank, "forward", falsified("loss", 0.01))
    with pytest.raises(DecompositionError, match="relative gap of L_q"):
        fit(net(n_heads=n_heads), (TOKENS, KEEP), **SETTINGS)


def test_a_wrong_identity_stops_training(monkeypatch):
    from ddcl_nb import training
    monkeypatch.setattr(training, "decompose", lambda *a, **k: (d := decompose(*a, **k))._replace(variance=d.variance * (1 + 1e-9)))
    with pytest.raises(DecompositionError, match="relative gap of L_q - L_OLS - V is [1-9]"):
        fit(net(), (TOKENS, KEEP), **SETTINGS)


DISTINCT = {
    "as many as prototypes": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "one more": torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),
    "one-hot": torch.eye(4),
}


@pytest.mark.parametrize("offset", [0.0, 3.3, 1000.0])
@pytest.mark.parametrize("distinct", DISTINCT)
def test_a_few_distinct_tokens_again_and_again_are_no_false_alarm(distinct, offset):
    tokens = (DISTINCT[distinct] + offset).repeat(30, 1)
    assert sound(fit(PrototypeBank(4, tokens.shape[-1]), tokens, epochs=3, anneal=Anneal(0.1, 0.001)), epochs=3)


def test_tokens_far_from_the_origin_are_no_false_alarm():
    assert sound(fit(PrototypeBank(3, 6), TOKENS + 1e4, **SETTINGS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_precision_is_no_false_alarm(dtype):
    model = net().to(dtype)
    assert sound(fit(model, TOKENS.to(dtype), **SETTINGS)) and {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_is_no_false_alarm():
    def loss(model, tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return bank_loss(model, tokens)
    assert sound(fit(net(), TOKENS, loss=loss, **SETTINGS))


# --- diagnostics

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_heads", [1, 2])
def test_diagnostics_are_what_can_be_computed_directly(n_heads, masked):
    torch.manual_seed(0)
    bank = PrototypeBank(4, 6, n_heads=n_heads, tau=0.2).init_from(TOKENS, "random").eval()
    batches = [(t, k if masked else None) for t, k in zip(TOKENS.split(10), KEEP.split(10))]
    with Diagnostics(bank) as signs, torch.no_grad():
        outputs = [bank(t, mask=k) if i else bank(t, k) for i, (t, k) in enumerate(batches)]
    row, keep = signs.row(), KEEP if masked else torch.ones_like(KEEP)
    whole = {name: torch.cat([getattr(o, name) for o in outputs]).reshape(24, n_heads, 5).movedim(1, 0)[:, keep] for name in Diagnostics.SUMS + ("indices",)}
    for name in ("loss", "recon", "variance", "free_energy"):
        assert row[name] == pytest.approx(float(whole[name].double().mean(1).sum()), rel=1e-6), name
    assert row["entropy"] == pytest.approx(float(whole["entropy"].double().mean()), rel=1e-6)
    used = [np.bincount(i.numpy(), minlength=4) / i.numel() for i in whole["indices"]]
    assert row["utilization"] == pytest.approx(np.mean([(u > 0).mean() for u in used]))
    assert row["perplexity"] == pytest.approx(np.mean([np.exp(-(u[u > 0] * np.log(u[u > 0])).sum()) for u in used]))
    pairs = [torch.nn.functional.pdist(p) for p in bank.prototypes.detach().reshape(n_heads, 4, -1)]
    assert row["separation_mean"] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert row["separation_min"] == pytest.approx(float(torch.stack(pairs).min()), rel=1e-5)
    assert row["tau"] == pytest.approx(0.2) and row["temperature"] == pytest.approx(float(bank.temperature.mean()))
    assert row["critical"] == pytest.approx(float(bank.critical.mean())) and 0 <= row["gap"] <= 1e-12
    assert row["loss"] == pytest.approx(row["recon"] + row["variance"], rel=1e-5)
    for h in range(n_heads if n_heads > 1 else 0):
        assert row[f".{h}.loss"] == pytest.approx(float(whole["loss"][h].double().mean()), rel=1e-6)
        assert row[f".{h}.critical"] == pytest.approx(float(bank.critical[h]))


def test_several_banks_have_columns_of_their_own_and_hooks_go_away():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": DDCLAttention(6, 3), "two": DDCLReadout(6, 4)})
    with Diagnostics(model) as signs:
        model["one"](TOKENS), model["two"](TOKENS, KEEP)
    row = signs.row()
    assert row["loss"] == pytest.approx(row["one.bank.0.loss"] + row["two.bank.0.loss"])
    assert row["separation_min"] == min(row["one.bank.0.separation_min"], row["two.bank.0.separation_min"])
    model["one"](TOKENS)
    assert signs.row() == row


def test_tokens_that_do_not_count_are_not_diagnosed():
    bank = PrototypeBank(4, 6).init_from(TOKENS)
    dirty = TOKENS.masked_fill(~KEEP[..., None], float("nan"))
    rows = []
    for tokens in (TOKENS, dirty):
        with Diagnostics(bank.eval()) as signs:
            bank(tokens, KEEP)
        rows.append(signs.row())
    assert rows[0] == rows[1]
    with Diagnostics(bank) as signs:
        bank(TOKENS, torch.zeros_like(KEEP))
    assert signs.row() == {}


# --- rates, schedules and surroundings

@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_prototypes_and_the_rest_learn_at_two_rates(ratio):
    model = nn.ModuleList([net(), DDCLReadout(6, 3)])
    prototypes, others = param_groups(model, 1e-3, ratio)
    assert (prototypes["lr"], others["lr"]) == (ratio * 1e-3, 1e-3)
    assert {id(p) for p in prototypes["params"]} == {id(b.prototypes) for b in banks(model).values()}
    every = [id(p) for group in (prototypes, others) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    sgd = torch.optim.SGD([prototypes, others])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    rate = {id(p): group["lr"] for group in (prototypes, others) for p in group["params"]}
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(old - p, torch.full_like(p, rate[id(p)]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["lr", "ratio"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        param_groups(net(), **{name: value})


def test_frozen_prototypes_stay_and_the_rest_learns():
    model = net()
    initialise(model, TOKENS)
    model.layer.bank.prototypes.requires_grad_(False)
    before = model.layer.bank.prototypes.clone(), model.encode[0].weight.detach().clone()
    assert [group["name"] for group in param_groups(model)] == ["others"]
    fit(model, TOKENS, **(SETTINGS | dict(init=None)))
    assert model.layer.bank.prototypes.equal(before[0]) and not model.encode[0].weight.equal(before[1])


def test_a_schedule_in_tau_reaches_its_end():
    model = net()
    history = fit(model, TOKENS, **SETTINGS).history
    taus = [row["tau"] for row in history]
    torch.testing.assert_close(model.layer.bank.reduced_temperature, torch.full((2,), 0.05))
    assert taus == sorted(taus, reverse=True) and 0.05 < taus[-1] < taus[0] < 0.9


def test_a_schedule_in_raw_temperature_reaches_its_end():
    model = net()
    history = fit(model, TOKENS, **(SETTINGS | dict(anneal=None, temperature=Anneal(4.0, 0.25, shape="linear")))).history
    torch.testing.assert_close(model.layer.bank.temperature, torch.full((2,), 0.25))
    steps = [4 - 3.75 * (epoch - 1 + 3 / 4) / 5 for epoch in range(1, 6)]  # the last of four steps
    assert [row["temperature"] for row in history] == pytest.approx(steps)


def test_without_a_schedule_tau_stays():
    model = net()
    model.layer.bank.set_tau(torch.tensor([0.3, 0.6]))
    fit(model, TOKENS, **(SETTINGS | dict(anneal=None)))
    torch.testing.assert_close(model.layer.bank.reduced_temperature, torch.tensor([0.3, 0.6]))


def test_the_random_state_of_the_caller_is_untouched(tmp_path):
    model = net()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    data = DataLoader(TensorDataset(TOKENS, KEEP), 7, shuffle=True)
    fit(model, data, checkpoint=tmp_path / "run", **(SETTINGS | dict(init="kmeans")))
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("data", ["tensor", "loader", "loader with a worker", "dataset with noise"])
def test_the_random_state_of_the_caller_does_not_matter(data):
    results = []
    for state in (1, 2):
        model = net()
        torch.manual_seed(state)
        np.random.seed(state)
        results.append((model, fit(model, DATA[data](), **SETTINGS).history))
    assert results[0][1] == results[1][1] and same(results[0][0], results[1][0])


@pytest.mark.parametrize("data", ["loader with a generator", "loader with a sampler", "loader with a batch sampler"])
def test_one_loader_gives_two_runs_the_same_batches(data):
    loader, first, second = DATA[data](), net(), net()
    expected = fit(first, loader, **SETTINGS)
    assert fit(second, loader, **SETTINGS).history == expected.history and same(first, second)


def test_the_seed_matters():
    assert fit(net(), TOKENS, **SETTINGS).history != fit(net(), TOKENS, **(SETTINGS | dict(seed=4))).history


def test_training_lowers_the_loss_and_leaves_the_model_in_evaluation():
    bank = PrototypeBank(3, 6)
    history = fit(bank, TOKENS, epochs=20, lr=1e-2, anneal=Anneal(0.9, 0.05), init="random").history
    assert history[-1]["recon"] < 0.9 * history[0]["recon"] and not bank.training
    assert json.loads(json.dumps(history)) == history


class Named(nn.Module):
    "Calls its bank with keywords alone."

    def __init__(self):
        super().__init__()
        self.bank = PrototypeBank(3, 6)

    def forward(self, tokens, mask=None):
        return self.bank(tokens=tokens, mask=mask)


class Chain(nn.Module):
    "Two layers in a row, which may be one layer twice; `used` of them are called."

    def __init__(self, tied, used=2):
        super().__init__()
        self.one = DDCLAttention(6, 3)
        self.two = self.one if tied else DDCLAttention(6, 3)
        self.used = used

    def forward(self, tokens, mask=None):
        out = self.one(tokens, mask)
        return self.two(out.output, mask) if self.used == 2 else out


def test_a_bank_called_with_keywords_is_trained():
    model = Named()
    assert sound(fit(model, (TOKENS, KEEP), **SETTINGS))
    positional = PrototypeBank(3, 6)
    fit(positional, (TOKENS, KEEP), **SETTINGS)
    assert same(model.bank, positional)


def test_a_layer_that_is_called_twice_has_one_bank():
    model = Chain(tied=True)
    found = fit(model, (TOKENS, KEEP), **SETTINGS)
    assert sound(found) and list(banks(model)) == ["one.bank"] and "one.bank.0.loss" not in found.last


def test_a_bank_without_tokens_is_named_and_can_be_left_alone():
    model = Chain(tied=False, used=1)
    with pytest.raises(ValueError, match="no tokens reached the bank"):
        fit(model, (TOKENS, KEEP), **SETTINGS)
    idle = deepcopy(model.two)
    assert sound(fit(model, (TOKENS, KEEP), **(SETTINGS | dict(init=None))))
    assert model.two.bank.prototypes.equal(idle.bank.prototypes)


def test_a_mask_of_integers_is_a_mask():
    boolean, integer = net(), net()
    expected = fit(boolean, (TOKENS, KEEP), **SETTINGS)
    assert fit(integer, (TOKENS, KEEP.long()), **SETTINGS).history == expected.history and same(integer, boolean)


def test_evaluation_adds_columns_in_evaluation_mode():
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"score": len(modes)}
    found = fit(net(), TOKENS, evaluate=evaluate, **SETTINGS)
    assert modes == [(False, False)] * 5 and [row["score"] for row in found.history] == [1, 2, 3, 4, 5] and found.last["score"] == 5


@pytest.mark.parametrize("unsuitable, message", [
    (dict(epochs=0), "epochs must be a positive integer, got 0"), (dict(epochs=1.5), "epochs must be a positive integer, got 1.5"),
    (dict(batch_size=0), "batch_size must be a positive integer, got 0"), (dict(clip=0.0), "clip must be positive, got 0.0"),
    (dict(lr=-1.0), "lr must be positive"), (dict(temperature=Anneal(2.0, 1.0)), "not both"), (dict(init="grid"), "method must be one of .* got 'grid'")])
def test_unsuitable_arguments_are_named(unsuitable, message):
    with pytest.raises(ValueError, match=message):
        fit(net(), TOKENS, **(SETTINGS | unsuitable))


@pytest.mark.parametrize("data, error, message", [
    (iter([TOKENS]), TypeError, "data must be tensors, a Dataset or a re-iterable of batches, got list_iterator"), (3, TypeError, "data must be .* got int"),
    ((TOKENS, KEEP[:3]), ValueError, r"data must be tensors of one positive length, got lengths \[24, 3\]"), (TOKENS[:0], ValueError, "positive length, got lengths")])
def test_unsuitable_data_are_named(data, error, message):
    with pytest.raises(error, match=message):
        fit(net(), data, **SETTINGS)


def test_a_model_without_a_known_loss_asks_for_one():
    with pytest.raises(TypeError, match="the model returned Tensor.*give fit a loss"):
        fit(nn.Linear(6, 6), TOKENS, **(SETTINGS | dict(init=None)))


class Coder(nn.Module):
    "A linear encoder with a decoder, so that every anchor has what it needs."

    def __init__(self, n_heads=1):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(4, 6)
        self.bank = PrototypeBank(3, 4, n_heads=n_heads, temperature=0.3)

    def forward(self, tokens, mask=None):
        return self.bank(self.encode(tokens), mask)


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("name", training.ANCHORS)
def test_an_anchor_is_its_loss_on_the_tokens_that_count(name, n_heads):
    torch.manual_seed(0)
    model, tokens = Coder(n_heads).eval(), TOKENS.clone()
    z = model.encode(tokens[KEEP])
    alone = {"repulsion": lambda: losses.repulsion(model.bank.prototypes), "variance_floor": lambda: losses.variance_floor(z),
             "decorrelation": lambda: losses.decorrelation(z), "reconstruction": lambda: losses.reconstruction(model.decode(z), tokens[KEEP]),
             "on_sphere": lambda: (z - losses.on_sphere(z)).square().sum(-1).mean()}[name]()
    anchored = training.Anchored(bank_loss, training.anchor_settings({name: 3.0}))
    torch.testing.assert_close(anchored(model, tokens, KEEP), bank_loss(model, tokens, KEEP) + 3 * alone)
    tokens[~KEEP] = 1e6
    torch.testing.assert_close(anchored(model, tokens, KEEP), bank_loss(model, TOKENS, KEEP) + 3 * alone)


def test_an_anchor_holds_the_scale_of_an_encoder_that_shrinks_without_it():
    scale = {}
    for anchors in (None, {"variance_floor": {"weight": 10.0, "floor": 0.5}}):
        torch.manual_seed(0)
        model = Coder()
        fit(model, TOKENS, epochs=60, batch_size=24, lr=1e-2, anchors=anchors, init="random")
        scale[anchors is None] = float(model.encode(TOKENS).detach().flatten(0, 1).std(0).mean())
    assert scale[True] < 0.2 and scale[False] > 0.4


@pytest.mark.parametrize("anchors", [{"on_sphere": 2.0}, {"reconstruction": {"weight": 0.5}, "variance_floor": {"floor": 0.7}}])
def test_a_run_with_anchors_resumes_under_the_same_anchors_only(tmp_path, anchors):
    path, settings = tmp_path / "run.safetensors", {**SETTINGS, "anneal": None}
    torch.manual_seed(0)
    whole, broken = Coder(), Coder()
    broken.load_state_dict(whole.state_dict())
    fit(whole, TOKENS, anchors=anchors, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, TOKENS, anchors=anchors, checkpoint=path, loss=break_at(10), **settings)
    with pytest.raises(StateError, match="was made with anchors="):
        fit(broken, TOKENS, anchors={"repulsion": 1.0}, checkpoint=path, **settings)
    assert fit(broken, TOKENS, anchors=anchors, checkpoint=path, **settings).resumed_from and same(whole, broken)


@pytest.mark.parametrize("anchors, message", [
    ({"floor": 1.0}, "anchors must be among .*; got 'floor'"), ({"repulsion": 0.0}, "weight of repulsion must be positive and finite, got 0.0"),
    ({"variance_floor": {"weight": math.nan}}, "weight of variance_floor"), ({"repulsion": "much"}, "weight of repulsion")])
def test_anchors_that_make_no_sense_are_named_before_anything_is_trained(anchors, message):
    model = Coder()
    before = deepcopy(model)
    with pytest.raises(ValueError, match=message):
        fit(model, TOKENS, anchors=anchors, epochs=1)
    assert same(model, before)


def test_anchors_pass_over_batches_too_small_for_them():
    model = Coder()
    found = fit(model, TOKENS.flatten(0, 1)[:57], batch_size=8, epochs=1, init="random", anchors={"variance_floor": np.float32(1), "decorrelation": 1, "reconstruction": 1})
    assert sound(found, epochs=1)


@pytest.mark.parametrize("settings", [{"flor": 1.0}, {"gamma": -1.0}])
def test_settings_of_anchors_are_checked_before_training(settings):
    with pytest.raises(ValueError, match="anchors: "):
        fit(Coder(), TOKENS, anchors={"repulsion": settings}, epochs=1)
