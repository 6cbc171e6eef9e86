"""Training losses of generative classifiers: pure functions (model, images, labels) -> scalar, in nats.

x is a batch (batch, *shape) in [0, 1], y its labels (batch,), D the unpadded dimension.
"""

import torch
from torch.nn import functional as F

from lib.models.protocol import GenerativeClassifier


def base(model: GenerativeClassifier, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p(x, y)/D: likelihood only (fetaya2020, Eq. 4 per dimension)."""
    return F.nll_loss(model(x), y) / model.dimension


def reweight(model: GenerativeClassifier, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p(x|y)/D - log p(y|x) (fetaya2020, Eq. 6): the second term weighs D times as in `base`."""
    scores = model(x)
    # log p(x|y) = score - log p(y);  log p(y|x) = score - logsumexp(scores)
    return F.nll_loss(scores - model.log_prior, y) / model.dimension + F.cross_entropy(scores, y)


def split(model: GenerativeClassifier, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p(x|y)/D - log p(y|z_s), for the split prior (fetaya2020, Appendix A.4).

    The paper says that z_s serves as logits and that "the z_s loss can be up-weighted", without the loss or
    the weight. Our reading: the z_s loss is the cross-entropy of the logits, -log p(y|z_s), with weight 1
    beside the likelihood per dimension, as in Eq. 6. Up-weighting -log p(z_s|y) itself cannot be meant:
    shrinking z_s and c together by a factor would gain its weight and cost only 1/D through the determinant,
    without bound.
    """
    z, log_det = model.encode(x)
    log_likelihood = model.prior.log_prob(z, y) + log_det
    return -log_likelihood.mean() / model.dimension + F.cross_entropy(model.prior.label_logits(z), y)
