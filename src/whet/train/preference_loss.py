"""The losses over pairs and judged answers, of log-probabilities that were summed over answers.

Plain functions on small tensors; what makes the log-probabilities, without logits, is `preference.py`'s.

Shapes: U pairs or judged answers.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from whet.sections import PreferenceSection


def dpo_loss(
    chosen_U: torch.Tensor,
    rejected_U: torch.Tensor,
    num_labels_U2: torch.Tensor,
    settings: PreferenceSection,
) -> torch.Tensor:
    """Return the loss of each pair.

    Args:
        chosen_U: log(p / p_reference) of the chosen answers.
        rejected_U: The same of the rejected ones.
        num_labels_U2: Tokens of both answers; ipo goes by the token, as its authors told trl's.
        settings: beta, the loss and its smoothing.

    Returns:
        sigmoid: arXiv 2305.18290, eq. 7, with label smoothing as in its conservative form; ipo:
        arXiv 2310.12036, eq. 17; hinge: arXiv 2305.10425.
    """
    beta = settings.beta
    if settings.loss_type == "ipo":
        chosen_U, rejected_U = chosen_U / num_labels_U2[:, 0], rejected_U / num_labels_U2[:, 1]
        return (chosen_U - rejected_U - 1 / (2 * beta)).square()
    margin_U = beta * (chosen_U - rejected_U)
    if settings.loss_type == "hinge":
        return torch.relu(1 - margin_U)
    right_U, wrong_U = -functional.logsigmoid(margin_U), -functional.logsigmoid(-margin_U)
    return right_U.lerp(wrong_U, settings.label_smoothing) if settings.label_smoothing else right_U


def odds_loss(chosen_U: torch.Tensor, rejected_U: torch.Tensor) -> torch.Tensor:
    """Return -log sigmoid of the log odds ratio of each pair (ORPO, arXiv 2403.07691, eq. 4 and 7).

    Args:
        chosen_U: Mean log-probability of the chosen answers' tokens, below 0.
        rejected_U: The same of the rejected ones.
    """
    # A certain answer, or none, has infinite odds.
    chosen_U, rejected_U = (x.clamp(max=-1e-7) for x in (chosen_U, rejected_U))
    odds_U = chosen_U - _log_one_minus_exp(chosen_U)
    return -functional.logsigmoid(odds_U - (rejected_U - _log_one_minus_exp(rejected_U)))


def _log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - e^x) for x < 0, by whichever form keeps its digits (Mächler 2012)."""
    # The form that is not taken must not be infinite either: its gradient times 0 would be no number.
    near = x > -0.6931471805599453  # -log 2
    far_x, near_x = torch.where(near, -1.0, x), torch.where(near, x, -0.1)
    return torch.where(near, torch.log(-torch.expm1(near_x)), torch.log1p(-torch.exp(far_x)))


def kto_loss(
    ratio_U: torch.Tensor, good_U: torch.Tensor, kl: torch.Tensor, settings: PreferenceSection
) -> torch.Tensor:
    """Return the loss of each judged answer (KTO, arXiv 2402.01306, eq. 8).

    Args:
        ratio_U: log(p / p_reference) of the answers.
        good_U: Whether each was judged a good one.
        kl: How far the model is from the reference, at least 0; without gradient.
        settings: beta and the weights.
    """
    apart_U = settings.beta * (ratio_U - kl)
    weight_U = torch.where(good_U, settings.desirable_weight, settings.undesirable_weight)
    return weight_U * (1 - torch.sigmoid(torch.where(good_U, apart_U, -apart_U)))
