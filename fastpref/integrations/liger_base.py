"""Base classes of the Liger losses: the constructor's checks and the passes over the head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.options import HeadOptions
from fastpref.logps.sequences import sequence_logps
from fastpref.validation import check_number


class LigerLoss(nn.Module):
    """Base class of all Liger losses.

    Args: as in `LigerFusedLinearDPOLoss`; numbers are further arguments that must be numbers.
    """

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        compiled: bool,
        chunk_size: int,
        head: dict[str, Any],
        **numbers: float,
    ):
        super().__init__()
        for name, value in {"beta": beta, **numbers}.items():
            check_number(name, value)
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size!r}, expected a positive integer")
        expected = (
            "precision",
            "strategy",
            "memory_budget",
            "backend",
            "gradient_tolerance",
            "head_gradient_tolerance",
            "gradient_seed",
        )
        for name in head:
            if name not in expected:
                raise ValueError(f"{name}: not an option; expected some of {', '.join(expected)}")
        HeadOptions(**head)
        # compiled and chunk_size are stored for code that reads them. There is nothing to compile,
        # and the size of tiles follows memory_budget.
        self.ignore_index, self.beta, self.head = ignore_index, beta, head
        self.compiled, self.chunk_size = compiled, chunk_size

    def _tokens(
        self, _input: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Token log-probs [B, T], with the same kernels for policy and reference.

        Equal models thus have margins of exactly 0.
        """
        options = {"ignore_index": self.ignore_index, **self.head}
        out = linear_token_logps(_input, weight, labels, bias, **options)
        assert isinstance(out, Tensor)
        return out

    def _sums(self, tokens: Tensor, target: Tensor, average: bool) -> Tensor:
        return sequence_logps(tokens, target, average=average, ignore_index=self.ignore_index)

    def _reference(
        self,
        use: bool,
        target: Tensor,
        average: bool,
        policy: tuple[Tensor, Tensor, Tensor | None],
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_logps: Tensor | None,
    ) -> Tensor | None:
        """The reference's sequence log-probs [B]; None without a reference.

        Args:
            use: whether the loss has a reference.
            average: whether sequence log-probs are means over tokens.
            policy: _input, lin_weight and bias of the policy.
        """
        if (ref_input is not None) + (ref_logps is not None) != use:
            raise ValueError(
                f"ref_input: got use_ref_model={use} with "
                f"{'no' if ref_input is None else 'a'} ref_input and "
                f"{'no' if ref_logps is None else 'a'} ref_logps, expected "
                f"{'one of the two' if use else 'neither'}"
            )
        if ref_logps is not None:
            if ref_logps.shape != target.shape[:1]:
                raise ValueError(
                    f"ref_logps: got shape {tuple(ref_logps.shape)}, expected [{target.shape[0]}]"
                )
            return ref_logps.detach()
        if ref_input is None:
            return None
        if ref_weight is None:
            _, ref_weight, bias = policy
            ref_bias = bias if ref_bias is None else ref_bias
        with torch.no_grad():
            tokens = self._tokens(ref_input, ref_weight, target, ref_bias)
        return self._sums(tokens, target, average)

    @torch.no_grad()
    def _logit_means(
        self, _input: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor
    ) -> Tensor:
        """The mean logit [2] of the sequences in the mask `first` [B] and of the other sequences.

        The mean is over the vocabulary and over all positions, including ignored ones. It equals
        the mean logit of the mean hidden state, so the head is applied to two tokens only.
        """
        wide = torch.float64 if _input.dtype == torch.float64 else torch.float32
        masks = torch.stack([first, ~first]).to(wide)
        with torch.autocast(_input.device.type, enabled=False):
            states = masks @ _input.sum(1, dtype=wide)
            states /= (masks.sum(1, keepdim=True) * _input.shape[1]).clamp(min=1)
        stats = linear_token_logps(
            states.to(_input.dtype),
            weight,
            torch.zeros(2, dtype=torch.int64, device=_input.device),
            bias,
            extras=("mean_logit",),
            token_indices=torch.arange(2, device=_input.device),
            **self.head,
        )
        assert isinstance(stats, TokenStats) and stats.mean_logit is not None
        return stats.mean_logit

    def _check(self, _input: Tensor, lin_weight: Tensor, target: Tensor, paired: bool) -> None:
        if _input.dim() != 3 or target.shape != _input.shape[:2]:
            raise ValueError(
                f"_input: got shape {tuple(_input.shape)} with target {tuple(target.shape)}, "
                "expected [B, T, H] and [B, T]"
            )
        if lin_weight.dim() != 2 or lin_weight.shape[1] != _input.shape[2]:
            raise ValueError(
                f"lin_weight: got shape {tuple(lin_weight.shape)}, expected [V, {_input.shape[2]}]"
            )
        if paired and _input.shape[0] % 2:
            raise ValueError(
                f"_input: got {_input.shape[0]} sequences, expected an even number, "
                "[chosen; rejected]"
            )


class Scores(NamedTuple):
    """The quantities of B pairs that all paired losses use."""

    chosen: Tensor  # [B] log-probs
    rejected: Tensor  # [B]
    lengths: tuple[Tensor, Tensor]  # [B] each: labelled tokens
    logit_means: Tensor  # [2] of chosen and rejected sequences
    nll: Tensor  # []

    def result(self, loss: Tensor, *others: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and Liger's auxiliary outputs, detached."""
        aux = self.chosen, self.rejected, *self.logit_means, self.nll, *others
        return loss, tuple(t.detach() for t in aux)


class PairedLoss(LigerLoss):
    """Base class of the losses of pairs: DPO, CPO, SimPO and ORPO."""

    def _scores(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        average: bool,
        nll: bool,
        nll_target: Tensor | None = None,
    ) -> Scores:
        """The pairs' log-probs and NLL. nll_target: the labels of the NLL, if not `target`."""
        self._check(_input, lin_weight, target, paired=True)
        pairs, ignored = target.shape[0] // 2, self.ignore_index
        labels, second_pass = target, False
        if nll and nll_target is not None:
            if nll_target.shape[0] < pairs or nll_target.shape[1:] != target.shape[1:]:
                raise ValueError(
                    f"nll_target: got shape {tuple(nll_target.shape)}, expected "
                    f"{tuple(target.shape)}"
                )
            nll_labels = nll_target[:pairs]
            both = (target[:pairs] != ignored) & (nll_labels != ignored)
            second_pass = bool((both & (target[:pairs] != nll_labels)).any())
            if not second_pass:  # one pass over the head has the labels of both
                chosen = torch.where(target[:pairs] == ignored, nll_labels, target[:pairs])
                labels = torch.cat([chosen, target[pairs:]])
        tokens = self._tokens(_input, lin_weight, labels, bias)
        sums = self._sums(tokens, target, average)
        loss = tokens.new_zeros(())
        if nll:
            nll_labels = (target if nll_target is None else nll_target)[:pairs]
            counted = nll_labels != ignored
            nll_tokens = tokens
            if second_pass:
                nll_tokens = self._tokens(_input[:pairs], lin_weight, nll_labels, bias)
            total = nll_tokens[:pairs].masked_fill(~counted, 0.0).sum(dtype=torch.float64)
            loss = (-total / counted.sum().clamp(min=1)).to(tokens.dtype)
        first = torch.arange(2 * pairs, device=target.device) < pairs
        means = self._logit_means(_input, lin_weight, bias, first)
        lengths = (target != ignored).sum(1)
        if average:  # the log-probs are divided by the lengths already
            lengths = torch.ones_like(lengths)
        return Scores(sums[:pairs], sums[pairs:], (lengths[:pairs], lengths[pairs:]), means, loss)
