"Two real processes against one: training, temperature, initialisation and divided banks; errors, losses of a worker, and resuming with another number of processes."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from ddcl_nb.assign import ddcl
from ddcl_nb.bank import PrototypeBank, following_together, initial_prototypes
from ddcl_nb.distributed import Processes, WorkerFailed, own_part, processes
from ddcl_nb.kmeans import kmeans, one_pass
from ddcl_nb.layers import DDCLAttention, DDCLReadout
from ddcl_nb.sharded import ShardedBank, sharded_ddcl
from ddcl_nb.storage import StateError
from ddcl_nb.temperature import Anneal, critical_temperature
from ddcl_nb.training import Mean, NonFiniteLoss, bank_loss, banks, fit, param_groups

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed and POSIX signals")

TOKENS = torch.randn(24, 5, 6, generator=torch.Generator().manual_seed(0))
KEEP = torch.arange(5) < torch.randint(1, 6, (24, 1), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
SETTINGS = dict(epochs=4, batch_size=7, anneal=Anneal(0.9, 0.05), seed=3, init="kmeans")


@pytest.fixture(autouse=True)
def one_thread():
    "The one process computes as each of the two does: sums of several threads differ in their last bits."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    "Two heads behind a linear map, nothing random."

    def __init__(self):
        super().__init__()
        self.encode, self.layer = nn.Linear(6, 6), DDCLAttention(6, 3, n_heads=2)

    def forward(self, tokens, mask=None):
        return self.layer(self.encode(tokens), mask)


class Noisy(Net):
    "The same with dropout and batch statistics."

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, tokens, mask=None):
        return self.layer(self.norm(self.encode(tokens).mT).mT, mask)


class Coder(nn.Module):
    "A linear encoder with a decoder, so that every anchor has what it needs."

    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.bank = nn.Linear(6, 4), nn.Linear(4, 6), PrototypeBank(3, 4, temperature=0.3)

    def forward(self, tokens, mask=None):
        return self.bank(self.encode(tokens), mask)


class Reader(nn.Module):
    "A classifier on a readout."

    def __init__(self):
        super().__init__()
        self.readout, self.head = DDCLReadout(6, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask=None):
        out = self.readout(tokens, mask)
        return self.head(out.output), out.loss


class Partly(nn.Module):
    "A branch that only some rows use, and one that none uses."

    def __init__(self):
        super().__init__()
        self.bank, self.some, self.none = PrototypeBank(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, tokens, mask=None):
        rows = tokens[:, 0, 0] > 0.8
        return self.bank(torch.where(rows[:, None, None], self.some(tokens), tokens) if rows.any() else tokens, mask)


def made(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def two_means(model, tokens, mask, labels):
    "Cross-entropy over documents, and the distortion over tokens under a mask."
    logits, distortion = model(tokens, mask)
    return [Mean(nn.functional.cross_entropy(logits, labels), len(labels)), Mean(0.3 * distortion, int(mask.count_nonzero()))]


def masked_batches():
    return [(t, k) for t, k in zip(TOKENS.split(7), KEEP.split(7))]


ANCHORS = {"repulsion": 0.01, "variance_floor": {"weight": 2.0, "floor": 1.5}, "decorrelation": 0.5, "on_sphere": 0.1, "reconstruction": 0.3}
RUNS = {
    "tensor": (Net, lambda: TOKENS, {}),
    "tokens and mask": (Net, lambda: (TOKENS, KEEP), {}),
    "double precision": (lambda: Net().double(), lambda: (TOKENS.double(), KEEP), {}),
    "one row left over": (Net, lambda: (TOKENS[:22], KEEP[:22]), {}),
    "dataset": (Net, lambda: TensorDataset(TOKENS, KEEP), {}),
    "loader with a generator": (Net, lambda: DataLoader(TensorDataset(TOKENS, KEEP), 7, shuffle=True, generator=torch.Generator().manual_seed(5)), {}),
    "batches": (Net, masked_batches, {}),
    "anchors": (Coder, lambda: (TOKENS, KEEP), dict(anneal=None, anchors=ANCHORS)),
    "anchors, one row left over": (Coder, lambda: TOKENS[:22], dict(anneal=None, anchors=ANCHORS)),
    "no initialisation": (Net, lambda: (TOKENS, KEEP), dict(init=None)),
    "two means": (Reader, lambda: (TOKENS, KEEP, LABELS), dict(loss=two_means)),
    "two means and anchors": (Reader, lambda: (TOKENS, KEEP, LABELS), dict(loss=two_means, anchors={"repulsion": 0.1, "variance_floor": 1.0})),
    "momentum, small clip": (Net, lambda: (TOKENS, KEEP), dict(clip=0.05, optimiser=lambda groups: torch.optim.SGD(groups, momentum=0.9), lr=0.05)),
    "parameters that some or none use": (Partly, lambda: TOKENS, {}),
}
EXACT = 1e-6


def run(name):
    kind, data, settings = RUNS[name]
    model = made(kind)
    found = fit(model, data(), **(SETTINGS | {"epochs": 4 if name == "tokens and mask" else 2} | settings))
    return model, found


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


# --- what the two processes do: each scenario returns what the tests look at

def scenario_runs(rank, folder):
    return {name: (state(model), found.history) for name in RUNS for model, found in [run(name)]}


def scenario_wrapped(rank, folder):
    "`fit` on a model that somebody wrapped."
    model = made(Net)
    wrapped = nn.parallel.DistributedDataParallel(model)
    groups = [(group["name"], len(group["params"])) for group in param_groups(wrapped)]
    fit(wrapped, (TOKENS, KEEP), **SETTINGS)
    return state(model), list(banks(wrapped)), groups


def scenario_own_loop(rank, folder):
    "A loop of one's own: DistributedDataParallel on equal parts, with the temperature followed together."
    model = made(lambda: Net().double())
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.Adam(param_groups(wrapped, 1e-2))
    with following_together(*banks(wrapped).values()):
        for tokens in TOKENS.double().split(8):
            optimiser.zero_grad()
            summed(wrapped(tokens[own_part(8, processes())])).backward()
            optimiser.step()
    return state(model)


def summed(out):
    "A loss that every parameter takes part in."
    return out.loss + out.output.square().mean()


def scenario_noisy(rank, folder):
    "Dropout and batch statistics: not what one process gives, but the same on both, and reproducible."
    first, again = made(Noisy), made(Noisy)
    return [(state(model), fit(model, (TOKENS, KEEP), **SETTINGS).history, state(model)) for model in (first, again)]


def caught(kind, call):
    with pytest.raises(kind) as error:
        call()
    return type(error.value).__name__, str(error.value)


class Broken(Dataset):
    "Whoever reads its last row gets an error."

    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, i):
        if i == 23:
            raise OSError("row 23 cannot be read")
        return TOKENS[i]


def scenario_errors(rank, folder):
    "What is wrong in one process only is raised in both, at once."
    found = {}
    poisoned = TOKENS.clone()
    poisoned[6, 0, 0] = float("nan")  # in the part of process 1
    batches = iter_again([poisoned[:7], TOKENS[7:14]])
    model = made(Net)
    found["nan"] = caught(NonFiniteLoss, lambda: fit(model, batches, **SETTINGS | {"init": None})), state(model)
    def loss(model, *batch):
        value = bank_loss(model, *batch)
        return value * float("nan") if rank else value
    found["nan in the loss"] = caught(NonFiniteLoss, lambda: fit(made(Net), TOKENS, loss=loss, **SETTINGS | {"init": None}))
    def raising(model, *batch):
        if rank == 1:
            raise KeyError("my own mistake")
        return bank_loss(model, *batch)
    found["loss"] = caught((KeyError, WorkerFailed), lambda: fit(made(Net), TOKENS, loss=raising, **SETTINGS | {"init": None}))
    found["reading"] = caught((OSError, WorkerFailed), lambda: fit(made(Net), Broken(), **SETTINGS | {"init": None}))
    found["another plan"] = caught((ValueError, WorkerFailed), lambda: fit(made(Net), TOKENS, **SETTINGS | {"lr": 1e-3 * (1 + rank)}))
    found["fewer batches"] = caught(WorkerFailed, lambda: fit(made(Net), iter_again([TOKENS[:7]] * (2 + rank)), **SETTINGS | {"init": None}))
    found["evaluation"] = caught((ZeroDivisionError, WorkerFailed), lambda: fit(made(Net), TOKENS, evaluate=lambda model: {"x": 1 / (1 - rank)}, **SETTINGS))
    folder = Path(folder) / "a file"
    if rank == 0:
        folder.write_text("in the way")
    dist.barrier()
    found["writing"] = caught((OSError, WorkerFailed), lambda: fit(made(Net), TOKENS, checkpoint=folder / "run", **SETTINGS))
    return found


class iter_again:
    "Batches without a length."

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def scenario_resume(rank, folder):
    "A run that two processes began and lost, continued by two; each looks at a folder of its own, and that of process 1 is empty."
    mine = Path(folder) / f"disk {rank}"
    mine.mkdir()
    if rank == 0:
        shutil.copy(Path(folder) / "lost" / "run", mine / "run")
    model = made(Net, seed=77 + rank)
    found = fit(model, (TOKENS, KEEP), checkpoint=mine / "run", **SETTINGS)
    again = caught(StateError, lambda: fit(made(Net), (TOKENS, KEEP), checkpoint=mine / "run", **SETTINGS | {"lr": 0.5}))
    return state(model), found.history, found.resumed_from, sorted(path.name for path in mine.iterdir()), again


def scenario_divided(rank, folder):
    "Data that a `DistributedSampler` has divided are not divided again."
    data = TensorDataset(TOKENS, KEEP)
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True, seed=1))
    rows = []
    def loss(model, tokens, mask):
        rows.append(tokens[:, 0, 0].tolist())
        return bank_loss(model, tokens, mask)
    found = fit(made(Net), loader, loss=loss, epochs=2, init=None)
    return rows, found.history


CLOUD = torch.randn(300, 6, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 7) + 30
MANY = torch.randn(4001, 4, generator=torch.Generator().manual_seed(5)) + 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(6)).repeat(201, 1)[:4001]
PART = [slice(0, 1000), slice(1000, None)]


def scenario_measures(rank, folder):
    "Temperature, initialisation and k-means on parts of unequal size."
    among, part = processes(), [slice(0, 100), slice(100, None)][rank]
    found = {"critical": critical_temperature(CLOUD[part], among=among),
             "fewer than dimensions": critical_temperature(CLOUD[:4][[slice(0, 1), slice(1, None)][rank]], among=among),
             "nothing here": critical_temperature(CLOUD[part], mask=torch.full((len(CLOUD[part]),), rank == 1), among=among),
             "weighted": critical_temperature(CLOUD[part], weights=torch.arange(300.0)[part], among=among)}
    for method in ("kmeans", "farthest", "random"):
        bank = PrototypeBank(5, 6, n_heads=2).init_from(CLOUD[part], method, among=among)
        found[method] = bank.prototypes.detach(), bank.variance
    found["many"] = kmeans(MANY[PART[rank]], 20, 1, among=among)
    found["missing"] = caught((ValueError, WorkerFailed), lambda: kmeans(MANY[PART[rank]] * (float("nan") if rank else 1), 20, among=among))
    return found


P = 2 * torch.randn(11, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def scenario_sharded(rank, folder):
    "Outputs and gradients of a divided bank, one `grad` and one mask after another."
    among, found = processes(), {}
    own = P[own_part(11, among)]
    for dtype in (torch.float64, torch.float32):
        for grad in ("full", "stop", "stop-loss"):
            for T in (0.05, 1.0):
                for keep in (None, KEEP):
                    z, p, t = (x.to(dtype).clone().requires_grad_() for x in (TOKENS, own, torch.tensor(T)))
                    out = sharded_ddcl(z, p, t, mask=keep, grad=grad, among=among)
                    pulled(out).backward()
                    found[dtype, grad, T, keep is None] = [x.detach() for x in out], z.grad, p.grad, t.grad
    bank = ShardedBank(11, 6, grad="full", tau=0.3).init_from(TOKENS, "kmeans++")
    start, loss = bank.gathered(), []
    optimiser = torch.optim.Adam(bank.parameters(), 1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        value = bank(TOKENS, KEEP).loss.sum()
        value.backward()
        optimiser.step()
        loss.append(float(value.detach()))
    refused = caught((ValueError, WorkerFailed), lambda: fit(bank, TOKENS, epochs=1))
    return found, start, bank.gathered(), bank.separation(), loss, refused


def pulled(out):
    "A scalar that asks something of every differentiable output."
    pull = torch.sin(torch.arange(out.centroids.numel(), dtype=out.centroids.dtype)).view_as(out.centroids)
    return (out.centroids * pull).sum() + (out.loss * 1.3 + out.recon * 0.4 + out.variance * 0.7 + out.entropy * 0.9 + out.free_energy * 0.2).sum()


SCENARIOS = {name.removeprefix("scenario_"): f for name, f in list(globals().items()) if name.startswith("scenario_")}


def worker(rank, port, folder, kill):
    "One of two processes; does all scenarios, or ends itself in the middle of a run."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=45))
    folder = Path(folder)
    if kill:
        calls = []
        def loss(model, *batch):
            calls.append(model.training)
            if rank == 1 and sum(calls) == 11:  # the third epoch's third batch
                os.kill(os.getpid(), signal.SIGKILL)
            return [Mean(bank_loss(model, *batch), int(batch[1].count_nonzero()))]
        found = caught(WorkerFailed, lambda: fit(made(Net), (TOKENS, KEEP), loss=loss, checkpoint=folder / "lost" / "run", **SETTINGS))
        (folder / f"killed {rank}.json").write_text(json.dumps(found))
        return
    torch.save({name: scenario(rank, str(folder)) for name, scenario in SCENARIOS.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_two(folder, kill):
    "Start both; their exit codes and what they said. What waits for another process for longer than 45 seconds is an error."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t; t.worker(int(sys.argv[1]), {port}, {str(folder)!r}, {kill})"]
    both = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], said


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    "A folder with the checkpoint of a run of two processes, one of which was killed."
    folder = tmp_path_factory.mktemp("two")
    codes, said = in_two(folder, kill=True)
    assert codes == [0, -signal.SIGKILL], said
    return folder


@pytest.fixture(scope="module")
def two(lost):
    "What each of two processes found."
    codes, said = in_two(lost, kill=False)
    assert codes == [0, 0], "\n".join(said)[-6000:]
    return [torch.load(lost / f"{rank}.pt", weights_only=False) for rank in range(2)]


def close(a, b, tolerance=EXACT):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.values(), b.values(), strict=True))


# --- training

@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(two, name):
    model, found = run(name)
    (here, history), (there, other) = (process["runs"][name] for process in two)
    assert same(here, there) and history == other
    close(here, state(model))
    assert len(history) == len(found.history) > 1
    for row, expected in zip(history, found.history):
        assert row.keys() == expected.keys()
        assert {k: v for k, v in row.items() if "gap" not in k} == pytest.approx({k: v for k, v in expected.items() if "gap" not in k}, rel=2e-5, abs=EXACT)
    assert not same(here, state(made(RUNS[name][0])))


def test_a_wrapper_changes_nothing(two):
    model = made(Net)
    fit(model, (TOKENS, KEEP), **SETTINGS)
    for found, names, groups in (process["wrapped"] for process in two):
        close(found, state(model))
        assert names == ["layer.bank"] and groups == [("prototypes", 1), ("others", 4)]


def test_a_loop_of_ones_own_follows_the_temperature_of_all_tokens(two):
    model = made(lambda: Net().double())
    optimiser = torch.optim.Adam(param_groups(model, 1e-2))
    for tokens in TOKENS.double().split(8):
        optimiser.zero_grad()
        summed(model(tokens)).backward()
        optimiser.step()
    close(two[0]["own_loop"], state(model))
    assert same(two[0]["own_loop"], two[1]["own_loop"])


def test_noise_differs_between_processes_and_models_do_not(two):
    (first, again), (other, _) = (process["noisy"] for process in two)
    assert same(first[2], other[2]) and same(first[2], again[2]) and first[1] == other[1] == again[1]
    assert first[2]["norm.running_mean"].abs().max() > 0


def test_rows_divided_by_a_sampler_stay_divided(two):
    (rows, history), (others, other) = (process["divided"] for process in two)
    assert history == other and all(len(batch) == 4 for batch in rows + others) and len(rows) == 6
    first = sum(rows[:3] + others[:3], [])
    assert sorted(first) == sorted(TOKENS[:, 0, 0].tolist()) and rows[:3] != rows[3:]


# --- errors

@pytest.mark.parametrize("name, on_zero, on_one, words", [
    ("nan in the loss", "NonFiniteLoss", "NonFiniteLoss", "epoch 1, step 1: the loss is nan"),
    ("loss", "WorkerFailed", "KeyError", "process 1 of 2 failed in the forward pass: KeyError: 'my own mistake'"),
    ("reading", "WorkerFailed", "OSError", "failed in reading a batch: OSError: row 23 cannot be read"),
    ("another plan", "WorkerFailed", "ValueError", "process 1 was given another run than process 0"),
    ("fewer batches", "WorkerFailed", "WorkerFailed", "the 2 processes are at different places"),
    ("evaluation", "WorkerFailed", "ZeroDivisionError", "failed in evaluation: ZeroDivisionError"),
    ("writing", "FileExistsError", "WorkerFailed", "process 0 of 2 failed in writing the checkpoint: ")])
def test_an_error_in_one_is_an_error_in_both(two, name, on_zero, on_one, words):
    found = [process["errors"][name] for process in two]
    kinds = {kind for kind, _ in found}
    if name == "reading":  # which of them met row 23 is a matter of the seed
        assert kinds == {"WorkerFailed", "OSError"}
    elif name == "writing":
        assert found[1][0] == on_one and found[0][0] in ("FileExistsError", "NotADirectoryError")
    else:
        assert [kind for kind, _ in found] == [on_zero, on_one]
    assert any(words in message for _, message in found)


def test_nan_in_one_process_takes_both_back(two):
    for (kind, message), found in (process["errors"]["nan"] for process in two):
        assert kind == "NonFiniteLoss" and "epoch 1, tokens hold" in message and "back at the end of epoch 0" in message
        assert same(found, state(made(Net)))


def test_the_loss_of_a_worker_is_an_error_and_not_a_silence(lost):
    kind, message = json.loads((lost / "killed 0.json").read_text())
    assert kind == "WorkerFailed" and "lost its connection" in message


# --- resuming

def test_one_process_continues_what_two_began(lost, tmp_path):
    shutil.copy(lost / "lost" / "run", tmp_path / "run")
    whole, model = made(Net), made(Net, seed=9)
    expected = fit(whole, (TOKENS, KEEP), **SETTINGS)
    found = fit(model, (TOKENS, KEEP), checkpoint=tmp_path / "run", **SETTINGS)
    assert found.resumed_from == 2
    close(state(model), state(whole))
    assert [row["objective"] for row in found.history] == pytest.approx([row["objective"] for row in expected.history], rel=1e-5)


def test_two_processes_continue_what_two_began(two):
    whole = made(Net)
    fit(whole, (TOKENS, KEEP), **SETTINGS)
    uninterrupted = two[0]["runs"]["tokens and mask"]
    for rank, (found, history, resumed, files, refusal) in enumerate(process["resume"] for process in two):
        close(found, state(whole))
        assert same(found, uninterrupted[0]) and history == uninterrupted[1] and resumed == 2
        assert files == (["run"] if rank == 0 else [])
        assert refusal[0] == "StateError" and "was made with lr=" in refusal[1]


# --- temperature and initialisation

def test_temperature_and_start_are_those_of_all_tokens(two):
    expected = {"critical": critical_temperature(CLOUD), "fewer than dimensions": critical_temperature(CLOUD[:4]),
                "nothing here": critical_temperature(CLOUD[100:]), "weighted": critical_temperature(CLOUD, weights=torch.arange(300.0))}
    for name, value in expected.items():
        here, there = (process["measures"][name] for process in two)
        assert here.equal(there)
        torch.testing.assert_close(here, value, rtol=1e-10, atol=0)
    for method in ("kmeans", "farthest", "random"):
        bank = PrototypeBank(5, 6, n_heads=2).init_from(CLOUD, method)
        (prototypes, variance), other = (process["measures"][method] for process in two)
        assert prototypes.equal(other[0]) and variance.equal(other[1]) and prototypes.equal(bank.prototypes)
        torch.testing.assert_close(variance, bank.variance, rtol=1e-6, atol=0)


def test_k_means_on_parts_is_k_means_on_all(two):
    whole = kmeans(MANY, 20, 1)
    here, there = (process["measures"]["many"] for process in two)
    assert here.prototypes.equal(there.prototypes) and here.passes == whole.passes and list(here.passes) == [1000, 4001]
    torch.testing.assert_close(here.prototypes, whole.prototypes, rtol=1e-6, atol=1e-6)
    assert here.inertia == pytest.approx(whole.inertia, rel=1e-9)
    assert {process["measures"]["missing"][0] for process in two} == {"NonFiniteElsewhere", "NonFiniteInput"}


# --- a divided bank

@pytest.mark.parametrize("dtype, T, tolerance", [(torch.float64, 1.0, 1e-6), (torch.float64, 0.05, 1e-6), (torch.float32, 1.0, 1e-5),
                                                 (torch.float32, 0.05, 2e-4)])  # distances are 1,000 T there, and rounded to 6e-8 of that
@pytest.mark.parametrize("grad", ["full", "stop", "stop-loss"])
@pytest.mark.parametrize("everything", [True, False])
def test_a_divided_bank_is_the_whole_bank(two, dtype, T, tolerance, grad, everything):
    z, p, t = (x.to(dtype).clone().requires_grad_() for x in (TOKENS, P, torch.tensor(T)))
    out = ddcl(z, p, t, mask=None if everything else KEEP, grad=grad, backend="reference")
    pulled(out).backward()
    (here, dz, first, dt), (there, other, second, _) = (process["sharded"][0][dtype, grad, T, everything] for process in two)
    for found, copy, expected in zip(here, there, out):
        torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
        assert found.equal(copy)
    scale = float(dz.abs().max().clamp_min(1))
    torch.testing.assert_close(dz, z.grad, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(torch.cat([first, second]), p.grad, rtol=tolerance, atol=tolerance * float(p.grad.abs().max()))
    torch.testing.assert_close(dt, t.grad, rtol=10 * tolerance, atol=tolerance)
    assert dz.equal(other)


def test_a_divided_bank_trains_like_a_whole_one(two):
    bank = PrototypeBank(11, 6, grad="full", tau=0.3).init_from(TOKENS, "kmeans++")
    start, optimiser, losses = bank.prototypes.detach().clone(), torch.optim.Adam(bank.parameters(), 1e-2), []
    for _ in range(5):
        optimiser.zero_grad()
        value = bank(TOKENS, KEEP).loss.sum()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    for _, began, ended, separation, loss, refused in (process["sharded"] for process in two):
        assert began.equal(start) and loss == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(ended, bank.prototypes.detach(), rtol=1e-5, atol=1e-5)
        assert float(separation.minimum) == pytest.approx(float(bank.separation().minimum), rel=1e-4)
        assert "divided over 2" in refused[1]


# --- alone

def test_alone_nothing_is_sent():
    among = Processes()
    kmeans(MANY, 5, among=among)
    sharded_ddcl(TOKENS, P.float(), 1.0, among=among)
    with following_together(*banks(model := made(Net)).values(), among=among):
        model(TOKENS)
    assert not among.traffic


@pytest.mark.parametrize("n, size", [(7, 3), (2, 5), (0, 2), (100, 7)])
def test_parts_are_the_whole_and_even(n, size):
    parts = [list(range(n))[own_part(n, Processes(rank, size))] for rank in range(size)]
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("arguments, message", [((1, 4), "at least the number of processes, 2; got 1"), ((4.0, 4), "got 4.0")])
def test_a_bank_too_small_to_divide_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardedBank(*arguments, among=Processes(0, 2))
    with pytest.raises(ValueError, match="n_heads must be 1 .* got 2"):
        ShardedBank(4, 4, n_heads=2)
    with pytest.raises(ValueError, match=r"prototypes must be \(4, 3\), got \(4, 2\)"):
        ShardedBank(4, 3).take_part(torch.zeros(4, 2))


def test_a_prototype_without_tokens_is_revived_and_the_sums_are_those_of_a_loop():
    z, p = MANY[:500].double(), torch.cat([MANY[:4].double(), torch.full((2, 4), 1e3, dtype=torch.float64)])
    found, nearest = one_pass(z, p), torch.cdist(z, p).argmin(-1)
    for k in range(6):
        torch.testing.assert_close(found.sums[k], (z[nearest == k] - p.mean(0)).sum(0), rtol=1e-9, atol=1e-9)
    assert found.counts.tolist() == torch.bincount(nearest, minlength=6).tolist()
    assert one_pass(z, kmeans(z, 6).prototypes).counts.min() > 0


def test_large_data_take_the_quick_k_means(monkeypatch):
    from ddcl_nb import bank
    monkeypatch.setattr(bank, "LARGE", 1000)
    assert initial_prototypes(MANY, 20, seed=1).equal(kmeans(MANY, 20, 1).prototypes)
    assert not initial_prototypes(MANY[:1000], 20, seed=1).equal(kmeans(MANY[:1000], 20, 1).prototypes)
