"""The split flow as the classifier it is trained to be: the class by z_s, the likelihood by all of z."""

import torch

from lib.models.glow import ConditionalGlow
from lib.models.priors import SplitGaussian
from lib.models.protocol import GenerativeClassifier


class LabelLatent(GenerativeClassifier):
    """Scores log p(x) + log p(y|z_s) of a conditional Glow with the split prior, (batch, classes), nats.

    fetaya2020, Appendix A.4, uses z_s "as logits", and the loss of Split trains exactly these: p(y|z_s) is the softmax
    of `SplitGaussian.label_logits`. The full posterior p(y|x), which also asks which class predicts z_n best, is
    another classifier; `ConditionalGlow` itself gives that one. logsumexp of the scores is log p(x) for both.
    """

    space, normalised, random = "pixels", True, True

    def __init__(self, flow: ConditionalGlow) -> None:
        super().__init__()
        if not isinstance(flow.prior, SplitGaussian):
            raise ValueError(f"flow must have the split prior, got {type(flow.prior).__name__}")
        self.flow, self.classes, self.shape, self.grey_levels = flow, flow.classes, flow.shape, flow.grey_levels

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        z, log_det = self.flow.encode(x, noise)
        log_prob = (self.flow.prior.log_prob(z) + self.flow.log_prior).logsumexp(1) + log_det
        return log_prob[:, None] + self.flow.prior.label_logits(z).log_softmax(1)
