"The clusterer as scikit-learn's users meet it: its own checks, pipelines, weights, streams, kinds of numbers, and files."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ddcl_nb import estimators
from ddcl_nb.data import DataNotFound, load_digits, load_space_catalogue
from ddcl_nb.estimators import DDCLClusterer, persistence
from ddcl_nb.metrics import clustering_accuracy, clustering_scores
from ddcl_nb.storage import StateError, load_state, save_state


@parametrize_with_checks([DDCLClusterer(), DDCLClusterer("auto"), DDCLClusterer(3, n_prototypes=6), DDCLClusterer(3, tau=0.05)])
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)


def clouds(n=400, K=4, m=3, seed=0, **options):
    return make_blobs(n, m, centers=K, center_box=(-20, 20), random_state=seed, **options)


KINDS = {"hard": {}, "soft": {"tau": 0.01}, "merged": {"n_prototypes": 8}, "auto": {"n_clusters": "auto"}}


@pytest.fixture(params=KINDS)
def kind(request):
    return {"n_clusters": 4, "random_state": 0} | KINDS[request.param]


def test_clouds_are_found_and_described(kind):
    X, y = clouds()
    model = DDCLClusterer(**kind).fit(X)
    assert clustering_accuracy(y, model.labels_) == 1 and model.n_clusters_ == 4 and model.n_iter_ >= 1 and model.n_features_in_ == 3
    proba = model.predict_proba(X)
    assert proba.shape == (400, 4) and model.cluster_centers_.shape == (4, 3) and model.transform(X).shape == (400, 4)
    np.testing.assert_allclose(proba.sum(1), 1)
    np.testing.assert_array_equal(proba.argmax(1), model.predict(X))
    np.testing.assert_array_equal(model.labels_, model.predict(X))
    np.testing.assert_allclose(proba.max(1), model.probabilities_)
    nearest = np.square(X[:, None] - model.prototypes_).sum(-1).min(1)
    assert model.inertia_ == pytest.approx(nearest.sum()) and model.score(X) == pytest.approx(-model.inertia_)
    assert model.temperature_ == pytest.approx(model.tau_ * model.critical_temperature_) and 0 < model.tau_ < 1
    np.testing.assert_allclose(model.cluster_centers_, [X[model.labels_ == k].mean(0) for k in range(4)], atol=0.3)


def test_the_same_random_state_gives_the_same_numbers(kind, monkeypatch):
    monkeypatch.setattr(estimators, "FEWEST_TOKENS", 200)  # fewer than there are, so that a sample is drawn
    monkeypatch.setattr(estimators, "TOKENS_PER_PROTOTYPE", 20)
    X = clouds(1200, cluster_std=2.0)[0]
    first, second = (DDCLClusterer(**kind).fit(X) for _ in range(2))
    np.testing.assert_array_equal(first.prototypes_, second.prototypes_)
    np.testing.assert_array_equal(first.labels_, second.labels_)
    assert first.inertia_ == second.inertia_


def test_a_second_fit_forgets_the_first(kind):
    (X, _), (other, _) = clouds(), clouds(900, seed=5)
    again = DDCLClusterer(**kind).fit(other).fit(X)
    fresh = DDCLClusterer(**kind).fit(X)
    np.testing.assert_array_equal(again.predict_proba(X), fresh.predict_proba(X))
    assert again.temperature_ == fresh.temperature_


def test_weights_stand_for_repeated_samples(kind):
    X, _ = clouds(120)
    weight = np.random.default_rng(0).integers(0, 4, len(X))
    weighted, repeated = DDCLClusterer(**kind).fit(X, sample_weight=weight), DDCLClusterer(**kind).fit(np.repeat(X, weight, 0))
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-6)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_) and weighted.score(X, sample_weight=weight) == pytest.approx(-weighted.inertia_)


@given(scale=st.sampled_from([1e-15, 1e-3, 7.0, 1e9, 1e15]), shift=st.sampled_from([0.0, 3.0, 1e3]), seed=st.integers(0, 5))
def test_units_do_not_matter(scale, shift, seed):
    X = clouds(100, seed=seed)[0]
    plain, moved = DDCLClusterer(4).fit(X), DDCLClusterer(4).fit((X + shift) * scale)
    assert clustering_accuracy(plain.labels_.astype(int), moved.labels_.astype(int)) == 1
    assert moved.tau_ == pytest.approx(plain.tau_) and moved.inertia_ == pytest.approx(plain.inertia_ * scale**2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kind_of_numbers_is_kept(dtype, kind):
    X = clouds()[0].astype(dtype)
    model = DDCLClusterer(**kind).fit(X)
    for values in (model.cluster_centers_, model.prototypes_, model.predict_proba(X), model.transform(X), model.probabilities_):
        assert values.dtype == dtype
    assert model.labels_.dtype == np.int32
    other = np.float64 if dtype == np.float32 else np.float32
    np.testing.assert_array_equal(model.predict(X.astype(other)), model.labels_)


def test_it_works_in_a_pipeline_a_search_and_with_pandas():
    X, y = clouds()
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(400) + 7)
    pipeline = make_pipeline(StandardScaler(), DDCLClusterer(4)).set_output(transform="pandas")
    distances = pipeline.fit(frame).transform(frame)
    assert list(distances.columns) == [f"ddclclusterer{k}" for k in range(4)] and (distances.index == frame.index).all()
    np.testing.assert_array_equal(distances.to_numpy().argmin(1), pipeline.predict(frame))
    search = GridSearchCV(DDCLClusterer(), {"n_clusters": [2, 4], "tau": [None, 0.01]}, cv=3).fit(frame)
    assert search.best_params_["n_clusters"] == 4 and clustering_accuracy(y, search.predict(frame)) == 1
    with pytest.raises(ValueError, match="feature names"):
        search.best_estimator_.predict(frame[["c", "b", "a"]])
    copy = clone(search.best_estimator_)
    assert copy.get_params() == search.best_estimator_.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(X)


def test_it_serves_topics_as_bertopic_asks():
    X, y = clouds(300)
    model = DDCLClusterer(4)
    model.fit(X, y=None)
    assert len(model.labels_) == len(model.probabilities_) == 300 and len(model.predict(X[:5])) == 5
    online, seen = DDCLClusterer(4), []
    for batch in np.array_split(X, 5):
        online = online.partial_fit(batch)
        assert len(online.labels_) == len(online.probabilities_) == len(batch)
        seen.append(online.labels_)
    assert clustering_accuracy(y, np.concatenate(seen).astype(int)) == 1  # clusters keep their numbers


def test_a_stream_reaches_what_a_fit_reaches(kind):
    X, _ = clouds(2000)
    whole, stream = DDCLClusterer(**kind).fit(X), DDCLClusterer(**kind)
    for batch in np.array_split(X, 10):
        stream.partial_fit(batch)
    assert -stream.score(X) < 1.1 * whole.inertia_ and stream.n_iter_ > 9
    assert clustering_accuracy(whole.labels_.astype(int), stream.predict(X).astype(int)) > 0.99
    assert stream.temperature_ == pytest.approx(whole.temperature_, rel=0.15)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("K", [5, 20])
def test_inertia_is_that_of_k_means_or_better(K, seed):
    X = load_digits().inputs[seed::3]
    assert DDCLClusterer(K).fit(X).inertia_ < 1.01 * KMeans(K, n_init=10, random_state=seed).fit(X).inertia_


@pytest.mark.parametrize("K", [1, 2, 4, 7])
def test_auto_finds_clouds_that_lie_apart(K):
    X = np.concatenate([12 * np.eye(10)[k] + np.random.default_rng(k).normal(size=(150, 10)) for k in range(K)])
    model = DDCLClusterer("auto").fit(X)
    assert model.n_clusters_ == K and persistence(*model.cooling_.T).keys() <= set(model.cooling_[:, 1])


def test_auto_on_few_equal_or_repeated_samples():
    assert DDCLClusterer("auto").fit([[1.0, 2.0]]).n_clusters_ == 1
    assert DDCLClusterer("auto").fit(np.ones((50, 2))).n_clusters_ == 1
    assert DDCLClusterer("auto").fit(np.repeat([[0.0], [1], [5]], 20, 0)).n_clusters_ == 3


def test_fewer_distinct_samples_than_clusters():
    X = np.repeat([[0.0, 1], [2, 3]], 10, 0)
    with pytest.warns(ConvergenceWarning, match="n_clusters=5, but there are only 2 distinct samples"):
        model = DDCLClusterer(5).fit(X)
    assert model.n_clusters_ == 2 and model.inertia_ < 1e-20 and model.predict_proba(X).shape == (20, 2)
    with warnings.catch_warnings(action="error"):
        assert DDCLClusterer(20).fit(np.random.default_rng(0).normal(size=(20, 2))).inertia_ < 1e-12


def test_the_regimes_of_the_orbit_catalogue():
    try:
        catalogue = load_space_catalogue()
    except (DataNotFound, ImportError) as error:
        pytest.skip(str(error))
    X = StandardScaler().fit_transform(catalogue.inputs).astype(np.float32)
    scores = clustering_scores(catalogue.labels, DDCLClusterer(4, n_prototypes=16, random_state=0).fit_predict(X))
    assert scores["acc"] > 0.98 and scores["recall"] > 0.87


@pytest.mark.parametrize("options, message", [
    ({"n_clusters": 0}, "n_clusters must be a positive integer or 'auto', got 0"), ({"n_clusters": 2.0}, "n_clusters .* got 2.0"),
    ({"n_clusters": "many"}, "n_clusters .* got 'many'"), ({"n_clusters": True}, "n_clusters .* got True"),
    ({"n_clusters": 4, "n_prototypes": 3}, "n_prototypes must be None or an integer of at least 4.* got 3"),
    ({"tau": 1.0}, "tau .* got 1.0"), ({"tau": float("nan")}, "tau .* got nan"), ({"tau": "low"}, "tau .* got 'low'"),
    ({"linkage": "best"}, "linkage must be one of .* got 'best'"), ({"n_clusters": 401}, "n_samples=400 should be >= n_clusters=401")])
def test_bad_hyperparameters_are_named_in_fit(options, message):
    model = DDCLClusterer(**options)
    with pytest.raises(ValueError, match=message):
        model.fit(clouds()[0])


@pytest.mark.parametrize("weight, message", [(np.zeros(400), "zero"), (-np.ones(400), "must not be negative, got -1"), (np.full(400, np.nan), "NaN")])
def test_bad_weights_are_named(weight, message):
    with pytest.raises(ValueError, match=f"(?is)sample.?weight.*{message}|{message}.*weight"):
        DDCLClusterer(3).fit(clouds()[0], sample_weight=weight)


def test_a_saved_model_is_the_same_model(tmp_path, kind):
    X = pd.DataFrame(clouds()[0], columns=["a", "b", "c"])
    model = DDCLClusterer(**kind).fit(X)
    again = DDCLClusterer.load(model.save(tmp_path / "model.safetensors"))
    assert again.get_params() == model.get_params() and list(again.feature_names_in_) == ["a", "b", "c"]
    for name in ("labels_", "cluster_centers_", "prototypes_", "probabilities_", "cooling_", "inertia_", "n_iter_", "temperature_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(again.partial_fit(X[::2]).prototypes_, model.partial_fit(X[::2]).prototypes_)


def altered(arrays, meta, change):
    if change == "foreign":
        meta = {"model": "another"}
    elif change == "code":
        meta = meta | {"parameters": meta["parameters"] | {"__reduce__": "os.system"}}
    elif change == "wide":
        arrays = arrays | {"prototypes_": arrays["prototypes_"][:, :2]}
    elif change == "labels":
        arrays = arrays | {"prototype_labels_": arrays["prototype_labels_"] + 9}
    elif change == "missing":
        arrays = {name: value for name, value in arrays.items() if name != "_masses"}
    elif change == "scalar":
        meta = meta | {"scalars": meta["scalars"] | {"temperature_": "warm"}}
    elif change == "nan":
        arrays = arrays | {"prototypes_": arrays["prototypes_"] * torch.nan}
    return arrays, meta


@pytest.mark.parametrize("change", ["foreign", "code", "wide", "labels", "missing", "scalar", "nan"])
def test_a_file_that_does_not_fit_together_is_refused(tmp_path, change):
    path = DDCLClusterer(4).fit(clouds()[0]).save(tmp_path / "model.safetensors")
    save_state(path, *altered(*load_state(path), change))
    with pytest.raises(StateError, match="model.safetensors does not hold a DDCLClusterer"):
        DDCLClusterer.load(path)


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(StateError, match="model.pkl"):
        DDCLClusterer.load(tmp_path / "model.pkl")
