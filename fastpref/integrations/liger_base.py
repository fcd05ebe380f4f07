"""What the Liger swap-ins share: the constructor's checks and the passes over the head."""

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
    """What the five have in common: the constructor's checks and the passes over the head."""

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
        expected = ("precision", "strategy", "memory_budget", "backend")
        for name in head:
            if name not in expected:
                raise ValueError(f"{name}: not an option; expected some of {', '.join(expected)}")
        HeadOptions(**head)
        # compiled and chunk_size are kept for code that reads them: there is nothing to compile,
        # and the tiles follow memory_budget.
        self.ignore_index, self.beta, self.head = ignore_index, beta, head
        self.compiled, self.chunk_size = compiled, chunk_size

    def _tokens(
        self, _input: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
    ) -> Tensor:
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
        """The reference's log-probs of the sequences; None without a reference."""
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
        """The mean logit [2] of the sequences in the mask first [B] and of the others, over the
        vocabulary and over all positions, ignored ones too.

        A mean of logits is the mean logit of the mean hidden state: two tokens for the head.
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
    """Of B pairs: log-probs [B], labelled tokens [B], both sides' mean logit [2], and the NLL."""

    chosen: Tensor
    rejected: Tensor
    lengths: tuple[Tensor, Tensor]
    logit_means: Tensor
    nll: Tensor

    def result(self, loss: Tensor, *others: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        aux = self.chosen, self.rejected, *self.logit_means, self.nll, *others
        return loss, tuple(t.detach() for t in aux)


class PairedLoss(LigerLoss):
    """DPO, CPO, SimPO and ORPO: sequences [chosen; rejected]."""

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
        self._check(_input, lin_weight, target, paired=True)
        pairs, ignored = target.shape[0] // 2, self.ignore_index
        labels, apart = target, False
        if nll and nll_target is not None:
            if nll_target.shape[0] < pairs or nll_target.shape[1:] != target.shape[1:]:
                raise ValueError(
                    f"nll_target: got shape {tuple(nll_target.shape)}, expected "
                    f"{tuple(target.shape)}"
                )
            wanted = nll_target[:pairs]
            both = (target[:pairs] != ignored) & (wanted != ignored)
            apart = bool((both & (target[:pairs] != wanted)).any())
            if not apart:  # one pass over the head for the labels of both
                chosen = torch.where(target[:pairs] == ignored, wanted, target[:pairs])
                labels = torch.cat([chosen, target[pairs:]])
        tokens = self._tokens(_input, lin_weight, labels, bias)
        sums = self._sums(tokens, target, average)
        loss = tokens.new_zeros(())
        if nll:
            wanted = (target if nll_target is None else nll_target)[:pairs]
            counted = wanted != ignored
            own = self._tokens(_input[:pairs], lin_weight, wanted, bias) if apart else tokens
            total = own[:pairs].masked_fill(~counted, 0.0).sum(dtype=torch.float64)
            loss = (-total / counted.sum().clamp(min=1)).to(tokens.dtype)
        first = torch.arange(2 * pairs, device=target.device) < pairs
        means = self._logit_means(_input, lin_weight, bias, first)
        lengths = (target != ignored).sum(1)
        if average:  # nothing is left to divide by
            lengths = torch.ones_like(lengths)
        return Scores(sums[:pairs], sums[pairs:], (lengths[:pairs], lengths[pairs:]), means, loss)
