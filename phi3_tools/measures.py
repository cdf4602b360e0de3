"""
What embeddings are measured by. A figure has a value for each model with a 95% bootstrap interval over images, and
for each two models their difference with a paired test; where it has no meaning it is undefined and says why.

Numbers in, numbers out: no model and no file.
"""

from collections.abc import Callable
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
NUM_NEIGHBOURS = 10
FOLDS = 5
SIGNIFICANCE = 0.05
UNLABELLED = -1
# Resamples of a statistic that is slower than a mean.
FEW_RESAMPLES = 200
# The images a class below which NMI and ARI have no interval: it would hold the true value too seldom.
FEWEST_IN_A_CLASS = 5


@dataclass
class Figure:
    """
    One figure of all models.

    `samples`: {model: an array with a row for each picture}, `statistic`: such rows -> the figure; `undefined`:
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


def why_undefined(vectors):
    """Why no figure can be had from these vectors, or None."""
    broken = int((~np.isfinite(vectors)).any(1).sum())
    if broken:
        return f"{broken} of {len(vectors)} vectors hold NaN or infinite values"
    if len(vectors) < 2:
        return "there is one picture only"
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


def retrieval(vectors, labels):
    """
    Each picture searched among all others, for those with another of their class.

    Returns:
        {figure: a value for each such picture}.
    """
    classes, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
    queries = np.flatnonzero(np.isin(labels, classes[counts > 1]))
    hits = {f"recall@{rank}": [] for rank in RANKS} | {"mAP": []}
    for some in np.array_split(queries, max(len(queries) // 1000, 1)):
        found = nearest(vectors, vectors[some], len(vectors), own=some)
        is_hit = labels[found] == labels[some, None]  # (queries, n - 1)
        for rank in RANKS:
            hits[f"recall@{rank}"].append(is_hit[:, :rank].any(1))
        precision = is_hit.cumsum(1) / np.arange(1, is_hit.shape[1] + 1)
        hits["mAP"].append((precision * is_hit).sum(1) / is_hit.sum(1))
    return {name: np.concatenate(each).astype(np.float64) for name, each in hits.items()}


def held_out_accuracy(vectors, labels, seed):
    """
    {classifier: whether each picture was told right by one that had not seen it}, by cross-validation over pictures of
    classes with two at least.
    """
    classes, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
    kept = np.isin(labels, classes[counts > 1])
    vectors, labels = vectors[kept], labels[kept]
    smallest = np.unique(labels, return_counts=True)[1].min()
    folds = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    training = len(labels) - -(-len(labels) // folds.n_splits)
    classifiers = {
        "k-NN accuracy": KNeighborsClassifier(min(5, training), metric="cosine", weights="distance"),
        "linear-probe accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
    }
    return {
        name: (cross_val_predict(each, vectors, labels, cv=folds) == labels).astype(np.float64)
        for name, each in classifiers.items()
    }


def clusters(vectors, labels, seed):
    """The class and the cluster of each labelled picture, `(n, 2)`, with as many clusters as classes."""
    kept = labels != UNLABELLED
    vectors, labels = vectors[kept], labels[kept]
    found = KMeans(len(np.unique(labels)), n_init=4, random_state=seed).fit_predict(vectors)
    return np.stack((labels, found), axis=1)


def linear_cka(left, right):
    """Linear CKA of two spaces `(n, d)`, by their matrices of inner products."""

    def centred(vectors):
        gram = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
        gram -= gram.mean(0)
        return gram - gram.mean(1, keepdims=True)

    left, right = centred(left), centred(right)
    return float((left * right).sum() / max(np.linalg.norm(left) * np.linalg.norm(right), 1e-12))


def overlap(left, right):
    """The share of the nearest neighbours that two spaces have in common, for each picture: `(n,)`."""
    own = np.arange(len(left))
    left, right = (nearest(each, each, NUM_NEIGHBOURS, own) for each in (left, right))
    return np.array([len(set(a) & set(b)) / len(a) for a, b in zip(left.tolist(), right.tolist())])


def text_to_image(texts, vectors, captions):
    """{figure: for each caption that is not empty whether a picture with that caption is among the nearest}."""
    captions = np.asarray(captions)
    given = captions != ""
    is_hit = captions[nearest(vectors, texts[given], max(RANKS))] == captions[given, None]
    return {f"recall@{rank}": is_hit[:, :rank].any(1).astype(np.float64) for rank in RANKS}


def after_change(gallery, changed, own, labels):
    """
    Changed pictures searched among all unchanged ones.

    Args:
        gallery: unit vectors of all pictures; changed: of some of them, changed; own: which these are.

    Returns:
        {figure: a value for each changed picture}. `moved` is the cosine distance to the unchanged picture, as a share
        of the mean distance between two pictures, so that spaces of other spreads compare.
    """
    first = nearest(gallery, changed, 1)[:, 0]
    num_pairs = len(gallery) * (len(gallery) - 1)
    spread = 1 - (np.square(gallery.sum(0, dtype=np.float64)).sum() - len(gallery)) / num_pairs
    found = {
        "moved": (1 - (gallery[own] * changed).sum(1).astype(np.float64)) / max(spread, 1e-12),
        "finds itself": (first == own).astype(np.float64),
    }
    classes, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
    has_fellows = np.isin(labels[own], classes[counts > 1])
    if len(classes) > 1 and has_fellows.any():
        after = nearest(gallery, changed[has_fellows], 1, own=own[has_fellows])[:, 0]
        before = nearest(gallery, gallery[own[has_fellows]], 1, own=own[has_fellows])[:, 0]
        mine = labels[own[has_fellows]]
        found["recall@1"] = (labels[after] == mine).astype(np.float64)
        found["fall of recall@1"] = (labels[before] == mine).astype(np.float64) - found["recall@1"]
    return found


def summarise(figures, num_resamples, seed):
    """
    Values with intervals, and differences with tests, as plain dicts; p-values are adjusted over all of them together
    by Benjamini and Hochberg's procedure.
    """
    done = [_summarise(figure, num_resamples, seed) for figure in figures]
    differences = [each for figure in done for each in figure["differences"]]
    if differences:
        adjusted = stats.false_discovery_control([each["p"] for each in differences])
        for each, p in zip(differences, adjusted):
            each["p_adjusted"] = float(p)
            each["beyond_noise"] = bool(p < SIGNIFICANCE)
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
    """Values `(models,)` of all models on the same resampled pictures, `(models, num_resamples)`."""

    def on(index, axis=-1):  # (..., n) -> (models, ...)
        if statistic is np.mean:
            return np.array([each[index].mean(axis) for each in samples])
        return np.array(
            [np.apply_along_axis(lambda rows, e=each: statistic(e[rows]), axis, index) for each in samples]
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
