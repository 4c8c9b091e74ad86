"""Attention whose positions are projected sinusoids of distances, as in Transformer-XL and the Conformer."""

import torch
from torch import Tensor, nn

from ..ops import _select, _validate
from ..ops._validate import each, expect
from ..ops.attention.api import composite_attention
from ..ops.attention.checks import reach
from ..ops.conv import checks


class RelativeAttention(nn.Module):
    """Self-attention with the relative positions of Transformer-XL: x [B,T,C] -> [B,T,C].

        s[b,h,i,j] = scale * ((q[b,i,h] + u[h])·k[b,j,h] + (q[b,i,h] + v[h])·r[h,:,i-j]),     scale = (C/H)**-0.5
        r[h,:,d]   = the rows of head h of relative_k_proj(e[d])
        e[d,2n]    = sin(d / 10000**(2n/C)),     e[d,2n+1] = cos(d / 10000**(2n/C))
        y[b,i]     = o_proj(softmax_j(s)[b,:,i,j] * value[b,j])

    No tensor of T x T exists, forward or backward.

    window: (left, right), what a query sees before and after itself; k stands for (k, k). By default everything.
    causal: hide what comes after a query.
    dropout: probability of dropping an attention weight while training.
    bias: whether q_proj, k_proj, v_proj and o_proj have one.
    Parameters: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``relative_k_proj`` (linear maps of C to C, the last one
    without bias), ``bias_u``, ``bias_v`` [H,C/H], zeros at first: the names of Parakeet, whose checkpoints load.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Dai et al. 2019, "Transformer-XL: attentive language models beyond a fixed-length context", section 3.3 and
    appendix B; Gulati et al. 2020.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        window: int | tuple[int, int] | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        each(_validate.positive, name, channels=channels, heads=heads)
        expect(name, "heads", channels % heads == 0, f"a divisor of {channels}", heads)
        expect(name, "channels", channels % 2 == 0, "an even number", channels)
        each(_validate.flag, name, causal=causal, bias=bias)
        _validate.probability(name, "dropout", dropout)
        _select.known(name, backend)
        self.window = None if window is None else reach(name, window, "mask", {})
        self.channels, self.heads, self.causal, self.dropout, self.backend = channels, heads, causal, dropout, backend
        options = dict(device=device, dtype=dtype)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(projection, nn.Linear(channels, channels, bias=bias, **options))
        self.relative_k_proj = nn.Linear(channels, channels, bias=False, **options)
        self.bias_u = nn.Parameter(torch.empty(heads, channels // heads, **options))
        self.bias_v = nn.Parameter(torch.empty(heads, channels // heads, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.relative_k_proj):
            linear.reset_parameters()
        nn.init.zeros_(self.bias_u)
        nn.init.zeros_(self.bias_v)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x [B,T,C] -> [B,T,C].

        memory: [B,M,C], what comes before x: seen, but not a query. mask: bool [B,M+T], False for padding.
        cu_seqlens: [N+1] of N packed sequences, B = 1, without memory.
        """
        name = type(self).__name__
        checks.last_dimension(name, "x", x, "C", self.channels)
        seen = x
        if memory is not None:
            checks.last_dimension(name, "memory", memory, "C", self.channels)
            expect(name, "memory", cu_seqlens is None, "None, because of cu_seqlens", memory)
            seen = torch.cat([memory, x], 1)
        checks.mask(name, mask, seen)
        T, S = x.shape[1], seen.shape[1]
        left, right = (S, T) if self.window is None else self.window
        left, right = min(left, max(S - 1, 0)), 0 if self.causal else min(right, max(T - 1, 0))
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1))
                   for linear, y in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen)))  # fmt: skip
        scale = q.shape[-1] ** -0.5
        y = composite_attention(
            q + self.bias_u.to(q.dtype),
            k,
            v,
            rel_query=q + self.bias_v.to(q.dtype),
            query_rel=self._distances(left, right, x) * scale,
            window=(left, right),
            outside="mask",
            causal=self.causal,
            key_mask=mask,
            cu_seqlens_q=cu_seqlens,
            dropout=self.dropout,
            training=self.training,
            scale=scale,
            backend=self.backend,
        )
        return self.o_proj(y.flatten(2))

    def _distances(self, left: int, right: int, x: Tensor) -> Tensor:
        """r of the distances from `left` down to -`right`, [H,D,W]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        distance = torch.arange(left, -right - 1, -1, device=x.device).to(wide)
        rate = 10000.0 ** (-torch.arange(0, self.channels, 2, device=x.device).to(wide) / self.channels)
        angle = distance[:, None] * rate
        embedded = torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(self.relative_k_proj.weight.dtype)
        return self.relative_k_proj(embedded).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.heads}"
        for name, usual in (("window", None), ("causal", False), ("dropout", 0.0), ("backend", "auto")):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)!r}"
        return text
