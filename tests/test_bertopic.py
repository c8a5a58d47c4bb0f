"The clusterer inside BERTopic itself: topics, probabilities of every document, and topics that go on learning with their probabilities."
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer

bertopic = pytest.importorskip("bertopic", reason="BERTopic is not installed (a development requirement)")
from bertopic.cluster import BaseCluster
from bertopic.dimensionality import BaseDimensionalityReduction
from bertopic.vectorizers import OnlineCountVectorizer

from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.metrics import clustering_accuracy

WORDS = [["orbit", "rocket", "moon", "launch"], ["goal", "hockey", "season", "player"], ["engine", "wheel", "driver", "brake"]]


def documents(n=240, seed=0):
    "Texts `(n,)` about three things, embeddings `(n, 12)` such as an encoder would give, and what each text is about."
    random = np.random.default_rng(seed)
    about = random.integers(0, 3, n)
    embeddings = 4 * np.eye(12)[about] + random.normal(size=(n, 12))
    return [" ".join(random.choice(WORDS[k], 6)) for k in about], embeddings.astype(np.float32), about


def topic_model(clusterer, reduction=None, **parts):
    "BERTopic without its own models: no encoder is loaded, and nothing is downloaded."
    return bertopic.BERTopic(embedding_model=None, umap_model=reduction or BaseDimensionalityReduction(), hdbscan_model=clusterer,
                             vectorizer_model=parts.pop("vectorizer_model", CountVectorizer()), **parts)


@pytest.mark.parametrize("reduction", [BaseDimensionalityReduction, lambda: PCA(5, random_state=0)], ids=["as they are", "PCA"])
@pytest.mark.parametrize("options", [{"n_clusters": 3}, {"n_clusters": "auto"}, {"n_clusters": 3, "n_prototypes": 9}], ids=["three", "auto", "merged"])
def test_topics_words_and_probabilities(options, reduction):
    texts, embeddings, about = documents()
    model = topic_model(DDCLClusterer(**options, random_state=0), reduction())
    topics, probabilities = model.fit_transform(texts, embeddings)
    assert clustering_accuracy(about, np.array(topics)) > 0.98 and len(set(topics)) == 3
    assert probabilities.shape == (240,) and (probabilities > 1 / 3).all() and (probabilities <= 1).all()
    for topic in set(topics):
        words = {word for word, _ in model.get_topic(topic)[:4]}
        assert words == set(WORDS[np.bincount(about[np.array(topics) == topic]).argmax()])


def test_new_documents_get_the_topics_that_the_clusterer_says():
    texts, embeddings, about = documents()
    model = topic_model(DDCLClusterer(3, random_state=0)).fit(texts, embeddings)
    new_texts, new_embeddings, new_about = documents(60, seed=1)
    topics, _ = model.transform(new_texts, new_embeddings)
    assert clustering_accuracy(new_about, np.array(topics)) > 0.98
    proba = model.hdbscan_model.predict_proba(new_embeddings)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    of_topic = np.array(model._map_predictions(np.arange(3)))
    np.testing.assert_array_equal(of_topic[proba.argmax(1)], topics)


def test_a_stream_of_documents_with_probabilities():
    texts, embeddings, about = documents(600)
    model = topic_model(DDCLClusterer(3, random_state=0), vectorizer_model=OnlineCountVectorizer())
    topics, probabilities = [], []
    for rows in np.array_split(np.arange(600), 5):
        model.partial_fit([texts[i] for i in rows], embeddings[rows])
        topics += model.topics_
        probabilities.append(model.hdbscan_model.probabilities_)
        assert len(model.topics_) == len(probabilities[-1]) == len(rows)
    assert clustering_accuracy(about, np.array(topics)) > 0.95, "topics keep their numbers"
    probabilities = np.concatenate(probabilities)
    assert (probabilities > 1 / 3).all() and (probabilities <= 1).all() and np.median(probabilities) > 0.9


def test_topics_by_hand_and_by_the_clusterer_are_told_apart():
    assert isinstance(topic_model(BaseCluster()).hdbscan_model, BaseCluster)
    model = topic_model(DDCLClusterer(3))
    assert isinstance(model.hdbscan_model, DDCLClusterer) and not model.calculate_probabilities
