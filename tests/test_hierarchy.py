"Hierarchies against their levels one by one, under padding and damage, with everything that walks through a model's banks, and as a compressor."
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddcl_nb.assign import decompose
from ddcl_nb.hierarchy import FLOWS, HierarchicalDDCL, counts_of_rank, in_chunks, pack_counts, rank_counts, unpack_counts
from ddcl_nb.layers import DDCLReadout
from ddcl_nb.losses import ddcl_loss
from ddcl_nb.stability import StabilityWarning, stability_report, watch
from ddcl_nb.temperature import Anneal, critical_temperature
from ddcl_nb.training import Diagnostics, banks, bank_loss, fit, param_groups

KEEP = torch.arange(10) < torch.tensor([[10], [7], [0], [3]])
KINDS = {
    "two levels": lambda: HierarchicalDDCL(6, (4, 3)),
    "three levels": lambda: HierarchicalDDCL(6, (4, 3, 2)),
    "histograms": lambda: HierarchicalDDCL(6, (4, 3), pool="histogram"),
    "residual": lambda: HierarchicalDDCL(6, (4, 3), pool=("residual", "centroid"), proto_dim=(None, 5)),
    "heads": lambda: HierarchicalDDCL(6, (4, 3), n_heads=(2, 3), proto_dim=(8, 9)),
    "chunks": lambda: HierarchicalDDCL(6, (4, 3, 2), chunk=4, pool=("centroid", "histogram", "centroid")),
    "through": lambda: HierarchicalDDCL(6, (4, 3), flow="through"),
    "stop": lambda: HierarchicalDDCL(6, (4, 3), grad="stop"),
}


def seeded(kind):
    torch.manual_seed(0)
    return KINDS[kind]()


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- each level alone

def test_levels_are_readouts_one_after_the_other():
    model, x = seeded("residual").init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    out = model(x, KEEP)
    first = model.levels[0](x, KEEP)
    second = model.levels[1](first.output[:, None], KEEP.any(-1, keepdim=True))
    torch.testing.assert_close(out.levels[0].summaries, first.output)
    torch.testing.assert_close(out.output, second.output)
    torch.testing.assert_close(out.loss, first.loss + second.loss)
    assert out.indices[1].equal(second.assignment.indices) and out.levels[0].mask.tolist() == [True, True, False, True]


def test_chunks_are_sequences_of_their_own():
    model, x = seeded("chunks").init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    out, (cut, keep) = model(x, KEEP), in_chunks(x.masked_fill(~KEEP[..., None], 0), 4, KEEP)
    assert out.output.shape == (4, 6 - 3) and out.levels[0].summaries.shape == (4, 3, 6)
    for b in range(4):
        for c in range(3):
            alone = model.levels[0](cut[b, c][None], keep[b, c][None]).output[0]
            torch.testing.assert_close(out.levels[0].summaries[b, c], alone)
    torch.testing.assert_close(model(cut, keep).output, out.output)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decomposition_holds_at_every_level_at_once(kind):
    model, x = seeded(kind).double().init_from(tokens(40, 10, 6).double()).eval(), tokens(4, 10, 6).double()
    seen = []
    for bank in banks(model).values():
        bank.register_forward_hook(lambda bank, args, out: seen.append((bank, args, out)))
    model(x, KEEP)
    assert len(seen) == len(model.levels)
    for bank, (z, mask), out in seen:
        z = z if bank.n_heads == 1 else z.unflatten(-1, (bank.n_heads, -1)).movedim(-2, -3)
        exact = decompose(z, bank.prototypes, bank.temperature, mask=mask)
        assert exact.gap < 1e-13
        for name in ("loss", "recon", "variance"):
            torch.testing.assert_close(getattr(out, name), getattr(exact, name), rtol=1e-9, atol=1e-9)


def test_the_total_is_the_sum_of_the_means_over_items_that_count():
    model, x = seeded("two levels").eval(), tokens(4, 10, 6)
    out = model(x, KEEP)
    by_hand = out.levels[0].assignment.loss[KEEP].mean() + out.levels[1].assignment.loss[[0, 1, 3]].mean()
    torch.testing.assert_close(out.loss, by_hand)
    assert bank_loss(model, x, KEEP) == out.loss == ddcl_loss(out)


# --- padding

@pytest.mark.parametrize("junk", [1e4, float("nan")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_outputs_nor_gradients(kind, training, junk):
    x, results = tokens(4, 10, 6), []
    for filler in (0.0, junk):
        model = seeded(kind).train(training)
        out = model(x.masked_fill(~KEEP[..., None], filler), KEEP)
        (out.output.square().sum() + out.loss).backward()
        results.append([out.output, out.loss, *(p.grad for p in model.parameters())])
    for clean, padded in zip(*results):
        assert clean.isfinite().all()
        torch.testing.assert_close(padded, clean)


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_is_no_more_than_padding(kind):
    model, x = seeded(kind).init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    wide, keep = torch.cat([x, tokens(4, 9, 6)], 1), torch.cat([KEEP, torch.zeros(4, 9, dtype=torch.bool)], 1)
    a, b = model(x, KEEP), model(wide, keep)
    torch.testing.assert_close(a.output, b.output)
    torch.testing.assert_close(a.loss, b.loss)
    assert model.compress(x, KEEP) == model.compress(wide, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_all_is_zero(kind):
    out = seeded(kind).eval()(tokens(4, 10, 6), KEEP & False)
    assert out.loss == 0 and out.output.eq(0).all() and all(index.eq(-1).all() for index in out.indices)


# --- gradients between levels

def gradients(flow, of):
    torch.manual_seed(0)
    model = HierarchicalDDCL(6, (4, 3), flow=flow, temperature=(2.0, 0.5))
    x = tokens(4, 10, 6).requires_grad_()
    of(model(x, KEEP)).backward()
    return x.grad, *(level.bank.prototypes.grad for level in model.levels)


def test_a_level_loss_stops_at_its_items_unless_it_flows_through():
    for below in gradients("detached", lambda out: out.levels[1].loss)[:2]:
        assert below is None or below.eq(0).all()
    for below in gradients("through", lambda out: out.levels[1].loss)[:2]:
        assert below.abs().max() > 0
    own = [gradients(flow, lambda out: out.levels[1].loss)[2] for flow in FLOWS]
    torch.testing.assert_close(*own)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_task_reaches_tokens_and_every_level_either_way(flow):
    found = gradients(flow, lambda out: out.output.square().sum())
    assert all(g.abs().max() > 0 for g in found)
    for mine, other in zip(found, gradients("through", lambda out: out.output.square().sum())):
        torch.testing.assert_close(mine, other)


def test_the_gradient_through_both_levels_is_that_of_finite_differences():
    torch.manual_seed(0)
    model = HierarchicalDDCL(6, (4, 3), flow="through", temperature=(2.0, 0.5)).double().eval()
    x = tokens(3, 5, 6).double()
    bank = model.levels[0].bank
    assert torch.autograd.gradcheck(lambda P: torch.func.functional_call(model, {"levels.0.bank.prototypes": P}, (x,)).loss, (bank.prototypes.detach().requires_grad_(),))


# --- start and temperatures

def test_init_places_each_level_among_the_summaries_of_the_one_below():
    x = tokens(60, 10, 6)
    model = HierarchicalDDCL(6, (4, 3)).init_from(x, "kmeans", seed=3)
    alone = DDCLReadout(6, 4, pool="centroid").init_from(x, "kmeans", seed=3)
    assert torch.allclose(sorted_rows(model.levels[0].bank.prototypes), sorted_rows(alone.bank.prototypes), atol=1e-4)
    below = model.eval()(x).levels[0].summaries
    again = DDCLReadout(6, 3, pool="centroid").init_from(below, "kmeans", seed=3)
    torch.testing.assert_close(sorted_rows(model.levels[1].bank.prototypes), sorted_rows(again.bank.prototypes), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.levels[1].bank.critical.double(), critical_temperature(below), rtol=1e-4, atol=0)


def sorted_rows(p):
    return p.detach()[p.detach()[:, 0].argsort()]


def test_every_level_is_at_the_given_share_of_its_own_critical_temperature():
    x = 7 * tokens(60, 10, 6)
    model = HierarchicalDDCL(6, (4, 3), tau=(0.3, 0.05)).init_from(x)
    for level, tau in zip(model.levels, (0.3, 0.05)):
        torch.testing.assert_close(level.bank.temperature / level.bank.critical, torch.tensor(tau))
    model.set_tau(0.2)
    assert [round(float(level.bank.reduced_temperature), 6) for level in model.levels] == [0.2, 0.2]
    model.set_tau((0.5, 0.1))
    assert float(model.levels[0].bank.tau) == 0.5


def test_a_projection_starts_at_the_principal_axes_dealt_out_to_heads():
    x = tokens(60, 10, 6) * torch.tensor([6.0, 5, 4, 3, 2, 1])
    model = HierarchicalDDCL(6, (3, 2), proto_dim=(4, None), n_heads=(2, 1)).init_from(x)
    z = model.levels[0].project(x).detach().flatten(0, 1)
    spread = z.std(0)
    assert spread[0] > spread[2] > spread[1] > spread[3]  # axes 1 and 3 in one head, 2 and 4 in the other
    correlations = torch.corrcoef(z.mT) - torch.eye(4)
    assert correlations.abs().max() < 1e-3


# --- with what walks through the banks of a model

def test_fit_trains_both_levels_resumes_and_records_each(tmp_path):
    x = tokens(120, 10, 6)
    mask = torch.arange(10) < torch.randint(1, 11, (120, 1), generator=torch.Generator().manual_seed(2))
    plan = dict(epochs=4, anneal=Anneal(0.5, 0.1), batch_size=40, lr=1e-3, seed=1)
    whole, halves = HierarchicalDDCL(6, (4, 3)), HierarchicalDDCL(6, (4, 3))
    result = fit(whole, (x, mask), **plan)
    row = result.last
    assert {"levels.0.bank.0.entropy", "levels.1.bank.0.entropy"} <= row.keys() and row["gap"] < 1e-12
    assert row["objective"] < result.history[0]["objective"]

    class Stop(Exception):
        pass

    def stop_after_two(model):
        stop_after_two.calls += 1
        if stop_after_two.calls == 3:
            raise Stop
        return {}
    stop_after_two.calls = 0
    with pytest.raises(Stop):
        fit(halves, (x, mask), checkpoint=tmp_path / "c.safetensors", evaluate=stop_after_two, **plan)
    resumed = HierarchicalDDCL(6, (4, 3))
    again = fit(resumed, (x, mask), checkpoint=tmp_path / "c.safetensors", **plan)
    assert again.resumed_from == 2
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_param_groups_diagnostics_and_states():
    model, x = seeded("heads").init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    groups = {g["name"]: g for g in param_groups(model, 1e-3, 10)}
    assert len(groups["prototypes"]["params"]) == 2 and len(groups["others"]["params"]) == 2
    with Diagnostics(model) as signs:
        model(x, KEEP)
    assert {f"levels.{l}.bank.{h}.tau" for l, heads in ((0, 2), (1, 3)) for h in range(heads)} <= signs.row().keys()
    other = seeded("heads")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x, KEEP).output, model(x, KEEP).output)


def test_stability_report_sees_every_level_and_which_is_above_its_critical_temperature():
    x = tokens(60, 10, 6)
    model = HierarchicalDDCL(6, (4, 3), temperature=1.5).init_from(x)
    report = stability_report(model, bank_loss, x)
    assert [sign.name for sign in report.banks] == ["levels.0.bank", "levels.1.bank"]
    assert report.banks[0].tau < 1 < report.banks[1].tau


def test_watch_warns_of_the_level_that_is_above_its_critical_temperature():
    x = tokens(60, 10, 6)
    model = HierarchicalDDCL(6, (4, 3)).init_from(x)
    with watch(model, every=1) as signs, pytest.warns(StabilityWarning, match="tau of levels.1.bank rose above 1"):
        fit(model, x, epochs=8, batch_size=20, init=None, temperature=Anneal(0.1, 1.5))
    assert not any("levels.0.bank" in warning for warning in signs.warnings)


def test_wide_items_have_the_same_principal_axes():
    x = torch.zeros(200, 3000)
    x[:, :40] = torch.randn(200, 40, generator=torch.Generator().manual_seed(3)) * torch.linspace(9, 1, 40)
    wide, narrow = (HierarchicalDDCL(x.shape[1], (3,), proto_dim=5).init_from(x[None], seed=1) for x in (x, x[:, :40]))
    a, b = (model.levels[0].project_in.weight.detach()[:, :40] for model in (wide, narrow))
    torch.testing.assert_close((a @ b.mT).abs(), torch.eye(5), atol=2e-2, rtol=0)


class Summaries(nn.Module):
    "A hierarchy that gives plain tensors, as a saved program must."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        out = self.model(x, mask)
        return out.output, *out.indices


@pytest.mark.parametrize("kind", ["two levels", "residual", "heads", "chunks"])
def test_export_gives_the_same_numbers(kind):
    model, x = seeded(kind).init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    torch.testing.assert_close(torch.export.export(model, (x, KEEP)).module()(x, KEEP).output, model(x, KEEP).output)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Summaries(model), (x, KEEP)), file)
    file.seek(0)
    for found, wanted in zip(torch.export.load(file).module()(x, KEEP), Summaries(model)(x, KEEP)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_training_under_autocast(kind):
    model = seeded(kind)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            out = model(tokens(4, 10, 6), KEEP)
    (out.output.float().square().sum() + out.loss).backward()
    assert out.loss.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_one_precision_answers_in_it(kind, dtype):
    out = seeded(kind).to(dtype)(tokens(4, 10, 6).to(dtype), KEEP)
    assert out.output.dtype == dtype and out.output.isfinite().all()


# --- as a compressor

@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_histograms_come_back_from_their_numbers(counts):
    rank, ways = rank_counts(counts), math.comb(sum(counts) + len(counts) - 1, sum(counts))
    assert 0 <= rank < ways and counts_of_rank(rank, sum(counts), len(counts)) == counts


@given(st.integers(1, 9), st.integers(1, 7), st.data())
def test_codes_come_back_and_cost_what_counting_says(n_codes, n_heads, data):
    total = data.draw(st.integers(0, 300))
    rows = [[0] * n_codes for _ in range(n_heads)]
    for row in rows:
        for _ in range(total):
            row[data.draw(st.integers(0, n_codes - 1)) if total < 20 else hash((total, len(row), sum(row))) % n_codes] += 1
    code = pack_counts(rows)
    assert unpack_counts(code, n_heads, n_codes) == rows
    bits = n_heads * math.log2(math.comb(total + n_codes - 1, total))
    assert len(code) <= (1 if total < 128 else 2) + math.ceil(bits / 8 + 1e-9)


@given(st.binary(max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_other_bytes_are_an_error_or_a_code_of_their_own(code, n_codes, n_heads):
    try:
        counts = unpack_counts(code, n_heads, n_codes)
    except ValueError:
        return
    assert pack_counts(counts) == code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, -1])
def test_what_is_sent_is_the_count_of_indices(kind, level):
    model, x = seeded(kind).init_from(tokens(40, 10, 6)).eval(), tokens(4, 10, 6)
    codes = model.compress(x, KEEP, level=level)
    bank, index = model.levels[level].bank, model(x, KEEP).indices[level]
    index = (index.unsqueeze(-2) if bank.n_heads == 1 else index).movedim(-2, 1).flatten(2)
    counts = model.decompress(codes, level=level)
    for b in range(4):
        for h in range(bank.n_heads):
            assert counts[b, h].tolist() == [int((index[b, h] == k).sum()) for k in range(bank.n_prototypes)]
    assert codes[2] == b"\0" and all(isinstance(code, bytes) for code in codes)


def test_a_truncated_code_is_an_error():
    model = seeded("two levels").init_from(tokens(40, 10, 6)).eval()
    code = model.compress(tokens(4, 10, 6))[0]
    for wrong in (code[:-1], code + b"\0", b"", b"\xff" * 9):
        with pytest.raises(ValueError, match="not a code"):
            model.decompress([wrong])


# --- bad input

@pytest.mark.parametrize("wrong, words", [
    (dict(n_prototypes=()), "n_prototypes must have one number for each level"), (dict(n_prototypes=(4, 0)), "n_prototypes must be a positive integer, got 0"),
    (dict(flow="half"), "flow must be one of detached, through; got 'half'"), (dict(chunk=0), "chunk must be a positive integer, got 0"),
    (dict(pool=("centroid",)), "pool must be one value or one for each of 2 levels"), (dict(pool="max"), "pool must be one of"),
    (dict(temperature=(1.0, -1.0)), "temperature must be positive"), (dict(tau=(0.1, float("nan"))), "tau must be positive")])
def test_unsuitable_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        HierarchicalDDCL(6, **wrong)


def test_unsuitable_tokens_are_named():
    model = seeded("two levels").eval()
    with pytest.raises(ValueError, match=r"tokens must be \(B, N, 6\)"):
        model(tokens(10, 6))
    with pytest.raises(TypeError, match="tokens must be a floating-point tensor"):
        model(torch.ones(2, 10, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="mask must have shape"):
        model(tokens(4, 10, 6), KEEP[:, :4])
    with pytest.raises(ValueError, match="level 2: n_prototypes is 3, but there are only 2 distinct"):
        seeded("two levels").init_from(tokens(2, 10, 6))
    with pytest.raises(ValueError, match="NaN"):
        model.train()(torch.full((4, 10, 6), torch.nan))
