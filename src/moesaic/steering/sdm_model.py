"""The SDM network and its calibration: an activation that knows how near it is to what it was right about.

n points, D features, M of the adaptor, C classes. q counts the nearest training points, in order, that are right and agree;
d says how far the nearest one is, 1 near to 0 far; both come from L2 distances in the adaptor's space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput

SOFTMAX_Q = math.e - 2
"""(2 + q) is then e: with d = 1, the softmax."""


def sdm(logits_nC: Tensor, q_n: Tensor, d_n: Tensor) -> Tensor:
    """(2 + q)^(d z_i) / sum_c (2 + q)^(d z_c)."""
    return log_sdm(logits_nC, q_n, d_n).exp()


def log_sdm(logits_nC: Tensor, q_n: Tensor, d_n: Tensor) -> Tensor:
    """The natural logarithm of `sdm`."""
    return torch.log_softmax(logits_nC * (d_n * torch.log(2 + q_n)).unsqueeze(-1), -1)


def sdm_loss(logits_nC: Tensor, q_n: Tensor, d_n: Tensor, label_n: Tensor) -> Tensor:
    """-log to base (2 + q) of the label's sdm, mean. Large q make its gradients small: 1 / ln(2 + q)."""
    nats_n = -log_sdm(logits_nC, q_n, d_n).gather(1, label_n[:, None])[:, 0]
    return (nats_n / torch.log(2 + q_n)).mean()


class Adaptor(nn.Module):
    """Frozen features [n, D] to h' [n, M] and logits [n, C]. The paper's 1-D CNN spans all of a feature vector: a product."""

    def __init__(self, dim: int, width: int, classes: int) -> None:
        super().__init__()
        self.adapt, self.classify = nn.Linear(dim, width), nn.Linear(width, classes)

    def forward(self, x_nD: Tensor) -> tuple[Tensor, Tensor]:
        h_nM = self.adapt(x_nD)
        return h_nM, self.classify(h_nM)


@dataclass
class Support:
    """The training points in the adaptor's space: h' [n, M], their labels, and what the network says of each."""

    h_nM: Tensor
    label_n: Tensor
    predicted_n: Tensor

    def look(self, h_mM: Tensor, predicted_m: Tensor, own: bool = False, most: int = 1000) -> tuple[Tensor, Tensor]:
        """q [m] and the distance to the nearest point [m]. `own`: these are the training points; each leaves itself out."""
        distance_mn = torch.cdist(h_mM, self.h_nM, compute_mode="donot_use_mm_for_euclid_dist")
        if own:
            distance_mn = distance_mn.clone().fill_diagonal_(float("inf"))
        count = min(most, len(self.h_nM) - int(own))
        near_mk, at_mk = distance_mn.topk(count, -1, largest=False)
        agrees_mk = (self.predicted_n[at_mk] == predicted_m[:, None]) & (self.label_n[at_mk] == predicted_m[:, None])
        q_m = agrees_mk.int().cumprod(1).sum(1).to(h_mM.dtype)
        return q_m, near_mk[:, 0]


class Distances:
    """Per class, the distances to the nearest training point of calibration points with q > 0: d = min_c (1 - eCDF_c)."""

    def __init__(self, nearest_n: Tensor, label_n: Tensor, q_n: Tensor, classes: int) -> None:
        self.sorted = [nearest_n[(label_n == c) & (q_n > 0)].sort().values for c in range(classes)]

    @classmethod
    def of(cls, sorted_C: list[Tensor]) -> Distances:
        """From the sorted distances themselves."""
        made = cls.__new__(cls)
        made.sorted = sorted_C
        return made

    def d(self, nearest_m: Tensor) -> Tensor:
        """1 at distance 0 for continuous distances, 0 beyond all that is known, and where a class has no such point."""
        return torch.stack([1 - ecdf(values, nearest_m) for values in self.sorted]).amin(0)


def ecdf(sorted_n: Tensor, value_m: Tensor) -> Tensor:
    """Share of the points at or below each value; 1 where there is no point."""
    if not len(sorted_n):
        return torch.ones_like(value_m)
    return torch.searchsorted(sorted_n, value_m.contiguous(), right=True).to(value_m.dtype) / len(sorted_n)


@dataclass
class Fitted:
    """A trained network with what q and d are computed from."""

    net: Adaptor
    support: Support
    distances: Distances
    classes: int
    balance: float
    """The least over classes of the median q on calibration points: what the epoch was chosen by."""

    @torch.no_grad()
    def look(self, x_mD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [m, C], q [m], d [m]."""
        h_mM, logits_mC = self.net(x_mD)
        q_m, nearest_m = self.support.look(h_mM, logits_mC.argmax(-1))
        return logits_mC, q_m, self.distances.d(nearest_m)


def fit(
    x_nD: Tensor, label_n: Tensor, calibration_xD: Tensor, calibration_label: Tensor, classes: int,
    *, width: int = 64, epochs: int = 20, lr: float = 1e-5, batch: int = 50, seed: int = 0,
) -> Fitted:  # fmt: skip
    """Train an adaptor. The first epoch is softmax; then q and d are those of the epoch before, each point without itself.

    The epoch kept has the largest class-balanced median of q on the calibration points. Raises BadInput for a class without
    points.
    """
    for name, labels in (("training", label_n), ("calibration", calibration_label)):
        missing = sorted(set(range(classes)) - set(labels.tolist()))
        if missing:
            raise BadInput(f"sdm: class {missing[0]} has no {name} point")
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Adaptor(x_nD.shape[1], width, classes)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    q_n, d_n = torch.full((len(x_nD),), SOFTMAX_Q), torch.ones(len(x_nD))
    best: Fitted | None = None
    weights = None
    for _ in range(epochs):
        for at in torch.randperm(len(x_nD), generator=random).split(batch):
            loss = sdm_loss(net(x_nD[at])[1], q_n[at], d_n[at], label_n[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        now = measured(net, x_nD, label_n, calibration_xD, calibration_label, classes)
        with torch.no_grad():
            h_nM, logits_nC = net(x_nD)
            q_n, nearest_n = now.support.look(h_nM, logits_nC.argmax(-1), own=True)
            d_n = now.distances.d(nearest_n)
        if best is None or now.balance > best.balance:
            best, weights = now, {name: value.clone() for name, value in net.state_dict().items()}
    assert best is not None
    assert weights is not None
    net.load_state_dict(weights)
    return best


@torch.no_grad()
def measured(
    net: Adaptor, x_nD: Tensor, label_n: Tensor, calibration_xD: Tensor, calibration_label: Tensor, classes: int
) -> Fitted:
    h_nM, logits_nC = net(x_nD)
    support = Support(h_nM, label_n, logits_nC.argmax(-1))
    h_mM, logits_mC = net(calibration_xD)
    q_m, nearest_m = support.look(h_mM, logits_mC.argmax(-1))
    distances = Distances(nearest_m, calibration_label, q_m, classes)
    balance = min(float(q_m[calibration_label == c].median()) for c in range(classes))
    return Fitted(net, support, distances, classes, balance)


@dataclass
class Verdict:
    """Of m points: the class, whether it is admitted, the probability the rule looked at, q, d and the rescaled similarity."""

    predicted_m: Tensor
    admitted_m: Tensor
    p_lower_m: Tensor
    q_m: Tensor
    d_m: Tensor
    rescaled_m: Tensor


class Calibrated:
    """The admission rule over one trained network: class-conditional accuracy `alpha` among what it admits."""

    def __init__(
        self,
        fitted: Fitted,
        x_nD: Tensor,
        label_n: Tensor,
        alpha: float = 0.95,
        epochs: int = 50,
        lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        if not 0.5 < alpha < 1:
            raise BadInput(f"sdm: alpha {alpha}: above 0.5, below 1")
        self.fitted, self.alpha, self.classes = fitted, alpha, fitted.classes
        logits_nC, q_n, d_n = fitted.look(x_nD)
        probs_nC = sdm(logits_nC, q_n, d_n)
        self.quantiles = [probs_nC[label_n == c, c].sort().values for c in range(self.classes)]
        self.label_n = label_n
        self.weight_CC = self._rescaler(logits_nC, q_n, d_n, label_n, epochs, lr, seed)
        o_nC, rescaled_n = self._rescaled(logits_nC, q_n, self._v(probs_nC))
        self.rescaled = [rescaled_n[label_n == c].sort().values for c in range(self.classes)]
        self.counts = [int((label_n == c).sum()) for c in range(self.classes)]
        self.least, self.floor_C = self._search(o_nC, rescaled_n, label_n)
        self.offset_C = torch.zeros(self.classes)

    def _v(self, probs_nC: Tensor) -> Tensor:
        """Each class's probability as a quantile of what calibration points of that class got."""
        return torch.stack([ecdf(self.quantiles[c], probs_nC[:, c]) for c in range(self.classes)], 1)

    def _rescaler(
        self, logits_nC: Tensor, q_n: Tensor, d_n: Tensor, label_n: Tensor, epochs: int, lr: float, seed: int
    ) -> Tensor:
        """W'' of v' = W''^T v, by Adam, a point at a time. The gradient of the loss to base (2 + q~) is v (o - label)."""
        v_nC = self._v(sdm(logits_nC, q_n, d_n))
        v, wanted = v_nC.double().numpy(), np.eye(self.classes)[label_n.numpy()]
        scale = np.log(2 + self._power(logits_nC, q_n, v_nC).double().numpy())
        weight, step = np.eye(self.classes), 0
        first = second = np.zeros_like(weight)
        random = np.random.default_rng(seed)
        for _ in range(epochs):
            for i in random.permutation(len(v)):
                step += 1
                z = scale[i] * (v[i] @ weight)
                o = np.exp(z - z.max())
                slope = np.outer(v[i], o / o.sum() - wanted[i])
                first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
                weight = weight - lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return torch.from_numpy(weight).to(v_nC.dtype)

    @staticmethod
    def _power(logits_nC: Tensor, q_n: Tensor, v_nC: Tensor) -> Tensor:
        """q~ = ln((2 + q)^v of the predicted class)."""
        return v_nC.gather(1, logits_nC.argmax(-1, keepdim=True))[:, 0] * torch.log(2 + q_n)

    def _rescaled(self, logits_nC: Tensor, q_n: Tensor, v_nC: Tensor) -> tuple[Tensor, Tensor]:
        """o [n, C] and q~ [n]; q~ is 0 where o names another class than the network."""
        power_n = self._power(logits_nC, q_n, v_nC)
        o_nC = sdm(v_nC @ self.weight_CC, power_n, torch.ones_like(power_n))
        same_n = o_nC.argmax(-1) == logits_nC.argmax(-1)
        return o_nC, torch.where(same_n, power_n, 0.0)

    def _search(self, o_nC: Tensor, rescaled_n: Tensor, label_n: Tensor) -> tuple[float, Tensor]:
        """The smallest q~ such that, among points at or above it, every class's (1 - alpha) quantile of o is at least alpha;
        and those quantiles. Infinity where there is none: nothing is admitted then."""
        for least in rescaled_n.unique().tolist():
            if math.floor(least) <= 0:
                continue
            at_n = rescaled_n >= least
            floors = []
            for c in range(self.classes):
                own = o_nC[at_n & (label_n == c), c]
                floors.append(float(own.quantile(1 - self.alpha)) if len(own) else 0.0)
            if min(floors) >= self.alpha:
                return float(least), torch.tensor(floors)
        return float("inf"), torch.ones(self.classes)

    def effective(self, rescaled_m: Tensor, c: int) -> Tensor:
        """n^_c: calibration points of the class at or below this similarity."""
        return self.counts[c] * ecdf(self.rescaled[c], rescaled_m)

    @torch.no_grad()
    def judge(self, x_mD: Tensor) -> Verdict:
        """Admit where the lower estimates of similarity and probability reach what the search found."""
        logits_mC, q_m, d_m = self.fitted.look(x_mD)
        v_mC = self._v(sdm(logits_mC, q_m, d_m))
        _, rescaled_m = self._rescaled(logits_mC, q_m, v_mC)
        band_mC = torch.stack([band(self.effective(rescaled_m, c), self.alpha) for c in range(self.classes)], 1)
        predicted_m = logits_mC.argmax(-1)
        chosen_mC = nn.functional.one_hot(predicted_m, self.classes).bool()
        lower_mC = torch.where(chosen_mC, v_mC - band_mC, v_mC + band_mC).clamp(0, 1)
        o_mC, lower_m = self._rescaled(logits_mC, q_m, lower_mC)
        p_m = o_mC.gather(1, predicted_m[:, None])[:, 0]
        enough_m = p_m - self.offset_C[predicted_m] >= self.floor_C[predicted_m]
        return Verdict(predicted_m, (lower_m >= self.least) & enough_m, p_m, q_m, d_m, lower_m)


def band(effective_m: Tensor, alpha: float) -> Tensor:
    """DKW: eps = sqrt(ln(2 / (1 - alpha)) / (2 n^)), 1 without a point, never more than 1."""
    eps_m = torch.sqrt(math.log(2 / (1 - alpha)) / (2 * effective_m.clamp(min=1e-9)))
    return torch.where(effective_m > 0, eps_m.clamp(max=1), 1.0)


def calibrate(
    x_nD: Tensor, label_n: Tensor, classes: int, *, alpha: float = 0.95, splits: int = 10, rescale_epochs: int = 50,
    rescale_lr: float = 1e-4, seed: int = 0, **training: object,
) -> Calibrated:  # fmt: skip
    """J random halves of the points, training and calibration; the split with the best class-balanced median of q is kept.
    Its floors are raised by how they vary: the median absolute deviation over splits times the alpha quantile of a Cauchy."""
    if splits < 1:
        raise BadInput(f"sdm: splits {splits}: at least 1")
    random = torch.Generator().manual_seed(seed)
    made: list[Calibrated] = []
    for split in range(splits):
        order = torch.randperm(len(x_nD), generator=random)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        fitted = fit(x_nD[first], label_n[first], x_nD[second], label_n[second], classes, seed=seed + split, **training)  # type: ignore[arg-type]
        made.append(Calibrated(fitted, x_nD[second], label_n[second], alpha, rescale_epochs, rescale_lr, seed + split))
    best = max(made, key=lambda one: one.fitted.balance)
    floors_JC = torch.stack([one.floor_C for one in made if one.least < float("inf")] or [best.floor_C])
    deviation_C = (floors_JC - floors_JC.median(0).values).abs().median(0).values
    best.offset_C = deviation_C * math.tan(math.pi * (alpha - 0.5))
    return best


@torch.no_grad()
def measure(rule: Calibrated, x_mD: Tensor, label_m: Tensor) -> dict[str, float | bool | None]:
    """Accuracy on all points; coverage, and accuracy of what is admitted (None where nothing is); the same where the softmax
    of the adaptor's logits must reach alpha instead."""
    verdict = rule.judge(x_mD)
    right_m = verdict.predicted_m == label_m
    sure_m = rule.fitted.net(x_mD)[1].softmax(-1).amax(-1) >= rule.alpha

    def among(chosen_m: Tensor) -> float | None:
        return float(right_m[chosen_m].float().mean()) if chosen_m.any() else None

    return {
        "accuracy": float(right_m.float().mean()),
        "coverage": float(verdict.admitted_m.float().mean()),
        "admitted_accuracy": among(verdict.admitted_m),
        "softmax_coverage": float(sure_m.float().mean()),
        "softmax_accuracy": among(sure_m),
        "can_admit": rule.least < float("inf"),
    }
