"""
What embeddings are measured by. A figure has a value for each model with a 95% bootstrap interval over images, and
for each two models their difference with a paired test; where it has no meaning it is undefined and says why.

Numbers in, numbers out: no model and no file.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RANKS = (1, 5, 10)
RANKED = (*(f"recall@{rank}" for rank in RANKS), "mAP")
NUM_NEIGHBOURS = 10
FOLDS = 5
SIGNIFICANCE = 0.05
UNLABELLED = -1
# Resamples of a statistic that is slower than a mean.
FEW_RESAMPLES = 200
# The images a class below which NMI and ARI have no interval: it would hold the true value too seldom.
FEWEST_IN_A_CLASS = 5


class Undefined(ValueError):
    """A figure has no meaning here; the message says why."""


@dataclass
class Figure:
    """
    One figure of all models.

    `samples`: {model: an array with a row for each image}, `statistic`: such rows -> the figure; `undefined`:
    {model: why it has none}.
    """

    group: str
    name: str
    samples: dict[str, np.ndarray]
    undefined: dict[str, str]
    statistic: Callable = np.mean
    higher_is_better: bool = True


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def check_finite(vectors: np.ndarray, model: str) -> None:
    """Raises ValueError if a model's vectors are not finite."""
    if not np.isfinite(vectors).all():
        raise ValueError(f"{model} gives vectors that are not finite. Are its weights whole?")


def why_undefined(vectors):
    """Why no figure can be had from these vectors, or None."""
    broken = int((~np.isfinite(vectors)).any(1).sum())
    if broken:
        return f"{broken} of {len(vectors)} vectors hold NaN or infinite values"
    if len(vectors) < 2:
        return "there is one image only"
    if np.allclose(vectors, vectors[0], atol=1e-7):
        return "all its vectors are equal"
    return None


def nearest(gallery: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None) -> np.ndarray:
    """
    The rows of `gallery` nearest to each query by cosine, nearest first, `(queries, k)`.

    `own` `(queries,)`: a row of the gallery to leave out for each query; `k` is then one row fewer at most.
    """
    k = min(k, len(gallery) - (own is not None))
    index = NearestNeighbors(n_neighbors=k + (own is not None), metric="cosine", algorithm="brute").fit(gallery)
    rows = index.kneighbors(queries, return_distance=False)
    if own is None:
        return rows
    is_own = rows == np.asarray(own)[:, None]
    is_own[~is_own.any(1), -1] = True
    return rows[~is_own].reshape(len(queries), k)


def recall(vectors: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the images, each searched among all others, with one of their own class among the `k` nearest."""
    rows = nearest(vectors, vectors, k, own=np.arange(len(vectors)))
    return float((labels[rows] == labels[:, None]).any(1).mean())


def pixel_vectors(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Raw pixels of equally large images as unit vectors: as they are, and with the images' mean taken off."""
    pixels = np.stack([np.asarray(image, np.float64).ravel() for image in images])
    return {"raw pixels": unit(pixels), "raw pixels, centred": unit(pixels - pixels.mean(0))}


def retrieval(
    queries: np.ndarray, wanted: np.ndarray, gallery: np.ndarray, labels: np.ndarray, own: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """
    Each query searched in a gallery for the rows whose label is the `wanted` one; `own` as in [`nearest`].

    Returns:
        {figure: a value for each query that has such a row}.

    Raises:
        Undefined: none has.
    """
    answers, counts = np.unique(labels, return_counts=True)
    kept = np.flatnonzero(np.isin(wanted, answers[counts > (own is not None)]))
    if not len(kept):
        raise Undefined("no query has an answer")
    values = {name: [] for name in RANKED}
    for some in np.array_split(kept, max(len(kept) // 1000, 1)):
        rows = nearest(gallery, queries[some], len(gallery), own=None if own is None else own[some])
        is_hit = labels[rows] == wanted[some, None]  # (queries, n)
        precision = is_hit.cumsum(1) / np.arange(1, is_hit.shape[1] + 1)
        values["mAP"].append((precision * is_hit).sum(1) / is_hit.sum(1))
        for rank in RANKS:
            values[f"recall@{rank}"].append(is_hit[:, :rank].any(1))
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in values.items()}


def classes_of_several(labels: np.ndarray) -> np.ndarray:
    """
    The classes with two images at least.

    Raises:
        Undefined: there are no two classes, or none has two images.
    """
    classes, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
    if len(classes) < 2:
        raise Undefined("there are no two classes")
    if counts.max() < 2:
        raise Undefined("no class has two images")
    return classes[counts > 1]


def same_class_retrieval(vectors: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Each image of a class with several searched among all others: see [`retrieval`]."""
    queries = np.flatnonzero(np.isin(labels, classes_of_several(labels)))
    return retrieval(vectors[queries], labels[queries], vectors, labels, own=queries)


def held_out_accuracy(vectors: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """
    {classifier: whether each image was told right by one that had not seen it}, by cross-validation over images of
    classes with two at least.
    """
    classes = classes_of_several(labels)
    if len(classes) < 2:
        raise Undefined("fewer than two classes have two images")
    kept = np.isin(labels, classes)
    vectors, labels = vectors[kept], labels[kept]
    smallest = np.unique(labels, return_counts=True)[1].min()
    folds = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    training = len(labels) - -(-len(labels) // folds.n_splits)
    classifiers = {
        "k-NN accuracy": KNeighborsClassifier(min(5, training), metric="cosine", weights="distance"),
        "linear-probe accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
    }
    return {
        name: np.equal(cross_val_predict(classifier, vectors, labels, cv=folds), labels).astype(np.float64)
        for name, classifier in classifiers.items()
    }


def clusters(vectors: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """The class and the cluster of each labelled image, `(n, 2)`, with as many clusters as classes."""
    classes_of_several(labels)
    kept = labels != UNLABELLED
    vectors, labels = vectors[kept], labels[kept]
    settings: dict = {"n_init": 4, "random_state": seed}
    found = KMeans(len(np.unique(labels)), **settings).fit_predict(vectors)
    return np.stack((labels, found), axis=1)


def gram(vectors: np.ndarray) -> np.ndarray:
    """The inner products of vectors `(n, d)` -> `(n, n)` in float64."""
    return vectors.astype(np.float64) @ vectors.T.astype(np.float64)


def linear_cka(left: np.ndarray, right: np.ndarray) -> float:
    """Linear CKA (Kornblith et al., 2019) of two spaces by their [`gram`] matrices."""
    left, right = (space - space.mean(0) for space in (left, right))
    left, right = (space - space.mean(1, keepdims=True) for space in (left, right))
    return float((left * right).sum() / max(np.linalg.norm(left) * np.linalg.norm(right), 1e-12))


def overlap(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of the nearest neighbours that two spaces have in common, for each image: `(n,)`."""
    own = np.arange(len(left))
    left, right = (nearest(space, space, NUM_NEIGHBOURS, own) for space in (left, right))
    return (left[:, :, None] == right[:, None]).any(2).mean(1)


def after_change(
    gallery: np.ndarray, changed: np.ndarray, own: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """
    Changed images searched among all unchanged ones.

    Args:
        gallery: unit vectors of all images; changed: of some of them, changed; own: which these are.

    Returns:
        {figure: a value for each changed image}. `moved` is the cosine distance to the unchanged image, as a share of
        the mean distance between two images, so that spaces of other spreads compare.
    """
    if not np.isfinite(changed).all():
        raise Undefined("it gives NaN or infinite values after this change")
    if not len(changed):
        raise Undefined("no image was changed")
    num_pairs = len(gallery) * (len(gallery) - 1)
    spread = 1 - (np.square(gallery.sum(0, dtype=np.float64)).sum() - len(gallery)) / num_pairs
    values = {
        "moved": (1 - (gallery[own] * changed).sum(1).astype(np.float64)) / max(spread, 1e-12),
        "finds itself": np.equal(nearest(gallery, changed, 1)[:, 0], own).astype(np.float64),
    }
    with suppress(Undefined):
        kept = np.isin(labels[own], classes_of_several(labels))
        own, mine = own[kept], labels[own[kept]]
        if len(own):
            after, before = (nearest(gallery, rows, 1, own)[:, 0] for rows in (changed[kept], gallery[own]))
            values["recall@1"] = (labels[after] == mine).astype(np.float64)
            values["fall of recall@1"] = (labels[before] == mine).astype(np.float64) - values["recall@1"]
    return values


def summarise(figures, num_resamples, seed):
    """
    Values with intervals, and differences with tests, as plain dicts; p-values are adjusted over all of them together
    by Benjamini and Hochberg's procedure.
    """
    done = [_summarise(figure, num_resamples, seed) for figure in figures]
    differences = [difference for figure in done for difference in figure["differences"]]
    if differences:
        adjusted = stats.false_discovery_control([difference["p"] for difference in differences])
        for difference, p in zip(differences, adjusted):
            difference["p_adjusted"] = float(p)
            difference["beyond_noise"] = bool(p < SIGNIFICANCE)
    return done


def _summarise(figure, num_resamples, seed):
    names = list(figure.samples)
    values = {name: {"undefined": reason} for name, reason in figure.undefined.items()}
    differences = []
    if names:
        samples = [figure.samples[name] for name in names]
        if figure.statistic is not np.mean:
            num_resamples = min(num_resamples, FEW_RESAMPLES)
        observed, resampled = bootstrap(samples, figure.statistic, num_resamples, seed)
        interval = _interval_of_means if figure.statistic is np.mean else _interval_of_clusters
        for name, value, others in zip(names, observed, resampled):
            low, high, _ = interval(value, others)
            values[name] = {"value": float(value), "low": low, "high": high, "n": len(samples[0])}
        if figure.statistic is not np.mean and len(samples[0]) < FEWEST_IN_A_CLASS * len(np.unique(samples[0][:, 0])):
            reason = {"low": None, "high": None, "no_interval": "too few images a class for an interval"}
            values |= {name: values[name] | reason for name in names}
        else:
            for left, right in combinations(range(len(names)), 2):
                difference = observed[left] - observed[right]
                low, high, p = interval(difference, resampled[left] - resampled[right])
                models = [names[left], names[right]]
                differences.append(
                    {"models": models, "difference": float(difference), "low": low, "high": high, "p": p}
                )
    return {
        "group": figure.group,
        "name": figure.name,
        "higher_is_better": figure.higher_is_better,
        "values": values,
        "differences": differences,
    }


def _interval_of_means(value, resampled):
    """Bounds by the percentiles of the bootstrap, and the p-value of 0."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    p = 2 * min((resampled <= 0).mean(), (resampled >= 0).mean())
    return float(low), float(high), float(min(max(p, 1 / len(resampled)), 1))


def _interval_of_clusters(value, resampled):
    """
    Bounds by the spread of the bootstrap around the value, and the p-value of 0. An image that is drawn twice agrees
    with itself, so that NMI and ARI of resampled images are too high: of the bootstrap the spread alone can be used.
    """
    spread = float(np.std(resampled))
    p = 2 * stats.norm.sf(abs(value) / spread) if spread else float(value == 0)
    return float(value - 1.96 * spread), float(value + 1.96 * spread), float(max(p, 1 / len(resampled)))


def bootstrap(samples, statistic, num_resamples, seed):
    """Values `(models,)` of all models on the same resampled images, `(models, num_resamples)`."""

    def on(index, axis=-1):  # (..., n) -> (models, ...)
        if statistic is np.mean:
            return np.array([rows[index].mean(axis) for rows in samples])
        return np.array(
            [np.apply_along_axis(lambda drawn, rows=rows: statistic(rows[drawn]), axis, index) for rows in samples]
        )

    everything = np.arange(len(samples[0]))
    if len(everything) == 1:
        observed = on(everything)
        return observed, np.repeat(observed[:, None], num_resamples, axis=1)
    result = stats.bootstrap(
        (everything,), on, n_resamples=num_resamples, vectorized=True, method="percentile", rng=seed, batch=50
    )
    return on(everything), result.bootstrap_distribution


def nmi(rows):
    return normalized_mutual_info_score(*rows.T)


def ari(rows):
    return adjusted_rand_score(*rows.T)
