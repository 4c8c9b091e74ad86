"""Attention in float64, written element by element from the definition and from nothing else, and a-priori bounds.

    s[i,j] = scale * q[i]·k[j] + rel_scale * r[i]·query_rel[:,c] + scale * k[j]·key_rel[:,W-1-c] + bias[c]
    c      = clip(j - m, -left, right) + left,   m = i + (end of the keys) - (end of the queries)

for every head and sequence; ``Elements`` builds each score by itself and leaves gradients to autograd.
"""

import functools

import torch

from convkernels.testing.accuracy import UNIT_ROUNDOFF
from convkernels.testing.attention import INPUTS
from convkernels.testing.philox import keep_mask

TINY = {torch.float64: 1e-300, torch.float32: 2.0**-140, torch.bfloat16: 2.0**-130, torch.float16: 2.0**-24}


def _on_the_cpu(method):
    """For many small operations: the default device, if that is another, would be waited for at each."""

    @functools.wraps(method)
    def call(*arguments, **options):
        if torch.get_default_device() == torch.device("cpu"):
            return method(*arguments, **options)
        with torch.device("cpu"):
            return method(*arguments, **options)

    return call


class Elements:
    """out [B,T,H,D] and lse [B,H,T] of a problem's tensors in float64, ``gradients``, and bounds of the error that a
    kernel may make. All on the CPU, wherever the tensors are.

    Bounds are a priori: every product and every sum of n terms in the accumulation type, an exponential whose argument
    carries the error of its score, probabilities and their gradients rounded to the tensors' type before a product, and
    one rounding of the result. Each gradient's bound is that of the same expression with absolute values.
    """

    @_on_the_cpu
    def __init__(self, problem, tensors):
        self.problem = problem
        self.t = {name: None if value is None else value.detach().cpu() for name, value in tensors.items()}
        for name, value in self.t.items():
            if value is not None and value.is_floating_point():
                self.t[name] = value.double()
        self.dtypes = {name: value.dtype for name, value in tensors.items() if value is not None}
        for name in INPUTS:
            if self.t[name] is not None:
                self.t[name] = self.t[name].clone().requires_grad_()
        self._evaluate()

    def _sequence(self, i):
        """First key, end of the keys, and place among the keys of query i."""
        t, (_, T, S) = self.t, self.problem.sizes
        if t["cu_seqlens_q"] is None:
            return 0, S, i + S - T
        queries, keys = t["cu_seqlens_q"].tolist(), t["cu_seqlens_k"].tolist()
        n = max(n for n in range(len(queries) - 1) if queries[n] <= i and queries[n + 1] > queries[n])
        return keys[n], keys[n + 1], i + keys[n + 1] - queries[n + 1]

    def _head(self, name, h):
        """A table of head h, [rows, W]."""
        table = self.t[name]
        return table if table is None or table.dim() == 2 else table[h]

    def _score(self, b, h, i, j, offset):
        """One score, and the sum of the absolute values of its terms."""
        p, t, W = self.problem, self.t, self.problem.left + self.problem.right + 1
        scale, q, k = p.head_size**-0.5, t["q"][b, i, h], t["k"][b, j, h // p.sharing]
        column = min(max(offset, -p.left), p.right) + p.left
        inside = -p.left <= offset <= p.right
        terms = [(q, k, scale)] if p.qk else []
        if inside or p.outside != 1:
            if t["query_rel"] is not None:
                low = t["rel_query"] is not None
                r = t["rel_query"][b, i, h] if low else q
                terms.append((r, self._head("query_rel", h)[:, column], 1.0 if low else scale))
            if t["key_rel"] is not None:
                terms.append((k, self._head("key_rel", h)[:, W - 1 - column], scale))
            if t["bias"] is not None:
                terms.append((t["bias"][h, column : column + 1], torch.ones(1, dtype=torch.float64), 1.0))
        score = sum(((x * y).sum() * factor for x, y, factor in terms), torch.zeros((), dtype=torch.float64))
        size = sum((x.detach() * y.detach()).abs().sum().item() * abs(factor) for x, y, factor in terms)
        return score, size

    def _evaluate(self):
        p, t, (B, T, S), H, D = self.problem, self.t, self.problem.sizes, self.problem.heads, self.problem.head_size
        self.p = torch.zeros(B, H, T, S, dtype=torch.float64)
        self.multiplier = torch.ones(B, H, T, S, dtype=torch.float64)
        if p.dropout:
            keep = torch.from_numpy(keep_mask(int(t["seed"]), p.dropout, B, T, H, S).copy()).transpose(1, 2)
            self.multiplier = keep.double() / (1 - p.dropout) if p.dropout < 1 else torch.zeros_like(self.multiplier)
        self.largest = 0.0
        self.offset = torch.zeros(T, S, dtype=torch.int64)
        out, lse = [], []
        for b in range(B):
            for i in range(T):
                first, end, place = self._sequence(i)
                self.offset[i] = torch.arange(S) - place
                seen = [
                    j
                    for j in range(first, end)
                    if (not p.causal or j <= place)
                    and (p.outside != 2 or -p.left <= j - place <= p.right)
                    and (t["key_mask"] is None or t["key_mask"][b, j])
                ]
                for h in range(H):
                    attended = self._attend(b, h, i, seen, place)
                    out.append(attended[0] + self._depthwise(b, h, i, first, end, place))
                    lse.append(attended[1])
        zero = torch.zeros(0, dtype=torch.float64)
        self.out = (torch.stack(out) if out else zero).reshape(B, T, H, D)
        self.lse = (torch.stack(lse) if lse else zero).reshape(B, T, H).transpose(1, 2)

    def _attend(self, b, h, i, seen, place):
        p, t = self.problem, self.t
        nothing = torch.zeros(p.head_size, dtype=torch.float64)
        if not seen:
            return nothing, torch.tensor(float("-inf"), dtype=torch.float64)
        scores, sizes = zip(*(self._score(b, h, i, j, j - place) for j in seen), strict=True)
        self.largest = max(self.largest, *sizes)
        scores = torch.stack(scores)
        probabilities = torch.softmax(scores, 0)
        self.p[b, h, i, seen] = probabilities.detach()
        weights = probabilities * self.multiplier[b, h, i, seen]
        result = sum((w * t["v"][b, j, h // p.sharing] for w, j in zip(weights, seen, strict=True)), nothing)
        return result, torch.logsumexp(scores, 0)

    def _depthwise(self, b, h, i, first, end, place):
        p, t = self.problem, self.t
        total = torch.zeros(p.head_size, dtype=torch.float64)
        if t["value_conv"] is None:
            return total
        for column in range(p.left + p.right + 1):
            j = place + column - p.left
            real = first <= j < end and (t["key_mask"] is None or t["key_mask"][b, j])
            if real and not (p.causal and j > place):
                total = total + t["value_conv"][h, :, column] * t["v"][b, j, h // p.sharing]
        if t["value_conv_bias"] is not None:
            total = total + t["value_conv_bias"][h]
        return total if t["value_conv_scale"] is None else total * t["value_conv_scale"][h]

    @_on_the_cpu
    def gradients(self):
        """By name, for the inputs that are given."""
        names = [name for name in INPUTS if self.t[name] is not None]
        loss = (self.out * self.t["grad"]).sum()
        if self.t["grad_lse"] is not None:
            loss = loss + torch.where(self.lse.isfinite(), self.lse * self.t["grad_lse"], 0.0).sum()
        if not loss.requires_grad:
            return {name: torch.zeros_like(self.t[name]) for name in names}
        found = torch.autograd.grad(loss, [self.t[name] for name in names], allow_unused=True)
        return {
            name: torch.zeros_like(self.t[name]) if value is None else value
            for name, value in zip(names, found, strict=True)
        }

    def _relative(self):
        """Relative error of a probability or of its gradient: what its score carries, and one rounding to the tensors'
        type, which kernels may do before a matrix product."""
        p, dtype = self.problem, self.dtypes["q"]
        (_, T, S), terms = self.problem.sizes, p.head_size + max(p.rank, 1) + p.left + p.right + 8
        unit = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        rounding = UNIT_ROUNDOFF[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0
        return unit * (2 * (terms + 4) * (self.largest + 1) + S + T + terms) * 2 + 2 * rounding

    @_on_the_cpu
    def check_out(self, out, lse):
        """The largest error as a fraction of its bound; AssertionError where it is above 1."""
        p, t, out, lse = self.problem, self.t, out.cpu(), lse.cpu()
        v = t["v"].detach().abs().repeat_interleave(p.sharing, 2)
        if t["key_mask"] is not None:
            v = torch.where(t["key_mask"][:, :, None, None], v, 0.0)
        size = torch.einsum("bhts,bshd->bthd", self.p * self.multiplier, v) + self._absolute_taps(v)
        worst = _check("out", out, self.out.detach(), size * self._relative(), out.dtype)
        empty = ~self.lse.isfinite()
        assert torch.equal(empty, lse == float("-inf")), "lse: -inf exactly where no key is seen"
        off = torch.where(empty, 0.0, (lse.double() - self.lse.detach()).abs())
        least = UNIT_ROUNDOFF[torch.float64 if out.dtype == torch.float64 else torch.float32]
        return max(worst, _share("lse", off, self._relative() + 16 * least * (self.largest + 4)))

    def _taps(self):
        """Per column, the value row of each query ([T], S for none)."""
        p, (_, T, S) = self.problem, self.problem.sizes
        for column in range(p.left + p.right + 1):
            wanted = column - p.left
            hits = (self.offset == wanted) & self._same_sequence() & (wanted <= 0 or not p.causal)
            yield torch.where(hits.any(1), hits.double().argmax(1) if S else torch.zeros(T, dtype=torch.int64), S)

    def _same_sequence(self):
        _, T, S = self.problem.sizes
        spans = [self._sequence(i) for i in range(T)]
        j = torch.arange(S)
        rows = [(j >= first) & (j < end) for first, end, _ in spans]
        return torch.stack(rows) if rows else torch.zeros(0, S, dtype=torch.bool)

    def _absolute_taps(self, v):
        t = self.t
        if t["value_conv"] is None:
            return 0.0
        v = torch.cat([v, torch.zeros_like(v[:, :1]) if v.shape[1] else v.new_zeros(v.shape[0], 1, *v.shape[2:])], 1)
        total = torch.zeros(v.shape[0], self.problem.sizes[1], *v.shape[2:], dtype=torch.float64)
        for column, rows in enumerate(self._taps()):
            total = total + v[:, rows] * t["value_conv"].detach()[..., column].abs()
        if t["value_conv_bias"] is not None:
            total = total + t["value_conv_bias"].detach().abs()
        scale = t["value_conv_scale"]
        return total if scale is None else total * scale.detach().abs()[:, None]

    @_on_the_cpu
    def check_gradients(self, found, through_out=False):
        """The largest error of gradients (by name) as a fraction of its bound; AssertionError where it is above 1.
        through_out: of a backend of DELTA_THROUGH_OUT."""
        expected, sizes = self.gradients(), self._absolute_gradients(through_out)
        shares = (
            _check(f"grad of {name}", value, expected[name], sizes[name] * self._relative() * 4, self.dtypes[name])
            for name, value in found.items()
        )
        return max(shares, default=0.0)

    def _absolute_gradients(self, through_out):
        """Each gradient's expression over absolute values."""
        p, (B, _, S), H = self.problem, self.problem.sizes, self.problem.heads
        W = p.left + p.right + 1
        t = {n: None if v is None else v.detach().abs() if v.is_floating_point() else v for n, v in self.t.items()}
        scale = p.head_size**-0.5
        k, v = (t[name].repeat_interleave(p.sharing, 2) for name in "kv")
        if t["key_mask"] is not None:
            k, v = (torch.where(t["key_mask"][:, :, None, None], x, 0.0) for x in (k, v))
        g = t["grad"]
        grad_p = torch.einsum("bthd,bshd->bhts", g, v) * self.multiplier
        lse = 0.0 if t["grad_lse"] is None else t["grad_lse"][..., None]
        delta = (self.p * grad_p).sum(3, keepdim=True) + lse
        if through_out:
            out = torch.einsum("bhts,bshd->bthd", self.p * self.multiplier, v) + self._absolute_taps(v)
            delta = delta + (g * out).sum(3).transpose(1, 2)[..., None]
        ds = self.p * (grad_p + delta)
        column = self.offset.clamp(-p.left, p.right) + p.left
        inside = (self.offset >= -p.left) & (self.offset <= p.right)
        hot = torch.nn.functional.one_hot(column, W).double()
        if p.outside == 1:
            hot = hot * inside[..., None]
        rows, columns = torch.einsum("bhts,tsw->bhtw", ds, hot), torch.einsum("bhts,tsw->bhsw", ds, hot).flip(3)
        total = {
            "q": torch.einsum("bhts,bshd->bthd", ds, k) * scale * p.qk,
            "k": torch.einsum("bhts,bthd->bshd", ds, t["q"]) * scale * p.qk,
            "v": torch.einsum("bhts,bthd->bshd", self.p * self.multiplier, g),
            "bias": rows.sum((0, 2)),
        }

        def tables(name):
            return t[name].expand(H, *t[name].shape) if t[name].dim() == 2 else t[name]

        def shared(name, value):
            return value.sum(0) if t[name].dim() == 2 else value

        if t["query_rel"] is not None:
            low = t["rel_query"] is not None
            r, factor = (t["rel_query"], 1.0) if low else (t["q"], scale)
            total["query_rel"] = shared("query_rel", torch.einsum("bthr,bhtw->hrw", r, rows) * factor)
            to_r = torch.einsum("bhtw,hrw->bthr", rows, tables("query_rel")) * factor
            total.update({"rel_query": to_r} if low else {"q": total["q"] + to_r})
        if t["key_rel"] is not None:
            total["key_rel"] = shared("key_rel", torch.einsum("bshd,bhsw->hdw", k, columns) * scale)
            total["k"] = total["k"] + torch.einsum("bhsw,hdw->bshd", columns, tables("key_rel")) * scale
        if t["value_conv"] is not None:
            if t["value_conv_scale"] is not None:
                plain = {**self.t, "value_conv_scale": None}
                original, self.t = self.t, plain
                total["value_conv_scale"] = (g * self._absolute_taps(v)).sum((0, 1, 3))
                self.t = original
                g = g * t["value_conv_scale"][:, None]
            total["value_conv_bias"] = g.sum((0, 1))
            extended = torch.cat([v, v.new_zeros(B, 1, *v.shape[2:])], 1)
            to_v, to_taps = torch.zeros_like(extended), []
            for c, source in enumerate(self._taps()):
                to_taps.append((g * extended[:, source]).sum((0, 1)))
                to_v.index_add_(1, source, g * t["value_conv"][..., c])
            total["value_conv"] = torch.stack(to_taps, -1)
            total["v"] = total["v"] + to_v[:, :S]
        for name in "kv":
            total[name] = total[name].unflatten(2, (p.groups, p.sharing)).sum(3)
        return total


def _check(name, actual, expected, slack, dtype):
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    bound = 1.01 * UNIT_ROUNDOFF[dtype] * expected.abs() + slack + TINY[dtype]
    return _share(name, (actual.detach().cpu().double() - expected).abs(), bound)


def _share(name, off, bound):
    if not off.numel():
        return 0.0
    share = off / bound
    worst = share.max().item()
    if not worst <= 1:  # also of a NaN
        where = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
        raise AssertionError(f"{name}: off by {worst:.3g} times the bound at {where}")
    return worst
