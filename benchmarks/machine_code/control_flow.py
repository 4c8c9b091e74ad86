"""The paths that machine code of a kernel can take: basic blocks, natural loops, and what one pass of a loop executes.

A pass is found from the work that it does, `{"LDGSTS": 4, "STG": 4, "FFMA": 224}`: of all ways from the loop's head
around to it again that execute exactly these numbers of such instructions, inner loops as often as it takes, the one of
the fewest instructions. So what a compiler does to branches and loops is no matter, and what is not needed for the work
(masks, rows that lie outside, warps that diverge) is not counted. But few instructions that are jumped over, an `if`
without `else`, are executed, unless they do work of the kinds named: {"LDG": 0} leaves out what loads.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial

from benchmarks.machine_code.instructions import CLASS_OF, MATRIX, Instruction, Unreadable, by_base, instructions_of

MOST_STATES = 1_000_000
MOST_OPTIONAL = 48  # instructions of an `if` that is taken to be what is usual


@dataclass
class Block:
    """Instructions that are executed one after the other."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)  # blocks
    calls: int | None = None  # a block

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @cached_property
    def classes(self) -> Counter:
        return Counter(CLASS_OF.get(i.base, "other") for i in self.instructions)

    def work(self, kinds: list[re.Pattern]) -> tuple[int, ...]:
        return tuple(sum(bool(kind.match(i.name)) for i in self.instructions) for kind in kinds)


@dataclass(frozen=True)
class Work:
    """What one pass of a loop does: so many instructions whose names begin like this, besides what `loops` within it
    do, so many passes of each."""

    counts: dict[str, int]
    loops: tuple[tuple[float, "Work"], ...] = ()

    @cached_property
    def kinds(self) -> list[re.Pattern]:
        return [re.compile(rf"{name}(?![A-Z0-9])") for name in self.counts]

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.counts.items())


@dataclass(frozen=True)
class Pass:
    """What one pass of a loop executes."""

    path: tuple[int, ...]  # blocks
    classes: Counter  # instructions

    @property
    def instructions(self) -> int:
        return self.classes.total()


ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSYNC", "KILL")  # of a block


class ControlFlow:
    """Of one kernel, from what `cuobjdump -sass` writes of it."""

    def __init__(self, code: str):
        self.blocks: list[Block] = []
        instructions = instructions_of(code)
        targets, before = {i.target for i in instructions}, None
        for i in instructions:
            if before is None or before.base in ENDS or i.address in targets:
                self.blocks.append(Block([]))
            self.blocks[-1].instructions.append(i)
            before = i
        if not self.blocks:
            raise Unreadable("no instructions")
        self._numbers = {block.instructions[0].address: n for n, block in enumerate(self.blocks)}
        for number, block in enumerate(self.blocks):
            last = block.last
            # Warps that have come apart are not followed.
            if last.base in ("BRA", "JMP") and ".DIV" not in last.name:
                block.after.append(self._block_at(last.target))
            ends = last.base in ("BRA", "BRX", "JMP", "EXIT", "RET", "KILL") and not last.conditional
            if not ends and number + 1 < len(self.blocks):
                block.after.append(number + 1)
        calls = {n: self._block_at(b.last.target) for n, b in enumerate(self.blocks) if b.last.base == "CALL"}
        returning = {target for target in calls.values() if self._returns(target)}
        for number, target in calls.items():
            block = self.blocks[number]
            if target in returning:
                block.calls = target
            else:  # a jump to far away
                block.after = [target, *(block.after if block.last.conditional else [])]

    def _block_at(self, address: int | None) -> int:
        if address not in self._numbers:
            raise Unreadable(f"a jump to {address}, where no instruction begins")
        return self._numbers[address]

    def _returns(self, entry: int) -> bool:
        seen, waiting = set(), [entry]
        while waiting:
            block = waiting.pop()
            if block not in seen:
                seen.add(block)
                waiting += self.blocks[block].after
        return any(self.blocks[block].last.base == "RET" for block in seen)

    @cached_property
    def _order(self) -> list[int]:
        """Blocks that can be reached, each but for loops after those before it."""
        seen, order, stack = {0}, [], [(0, iter(self.blocks[0].after))]
        while stack:
            block, rest = stack[-1]
            following = next((b for b in rest if b not in seen), None)
            if following is None:
                order.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].after)))
        return order[::-1]

    @cached_property
    def before(self) -> dict[int, list[int]]:
        """By block, those that lead to it."""
        found: dict[int, list[int]] = {block: [] for block in self._order}
        for block in self._order:
            for following in self.blocks[block].after:
                found[following].append(block)
        return found

    @cached_property
    def dominators(self) -> dict[int, int]:
        """By block, the last one that all ways to it pass (Cooper, Harvey and Kennedy)."""
        place = {block: n for n, block in enumerate(self._order)}
        found, changed = {0: 0}, True
        while changed:
            changed = False
            for block in self._order[1:]:
                known = [b for b in self.before[block] if b in found]
                one = known[0]
                for other in known[1:]:
                    while one != other:
                        if place[one] > place[other]:
                            one = found[one]
                        else:
                            other = found[other]
                if found.get(block) != one:
                    found[block], changed = one, True
        return found

    def dominates(self, one: int, other: int) -> bool:
        while other not in (one, 0):
            other = self.dominators[other]
        return other == one

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Natural loops: by head, the blocks that come back to it without leaving what it dominates."""
        found: dict[int, set[int]] = {}
        for block in self._order:
            for head in self.blocks[block].after:
                if self.dominates(head, block):
                    body, waiting = found.setdefault(head, {head}), [block]
                    while waiting:
                        one = waiting.pop()
                        if one not in body:
                            body.add(one)
                            waiting += self.before[one]
        return found

    def body_length(self, one: Pass) -> int:
        """Instructions of all blocks of the loop that a pass is of, executed or not, without those of subroutines."""
        return sum(len(self.blocks[block].instructions) for block in self.loops[one.path[0]])

    def _subroutine(self, entry: int) -> Counter:
        """The shortest way through a subroutine."""
        waiting, seen = [(0, entry, Counter())], set()
        while waiting:
            length, block, classes = heapq.heappop(waiting)
            if block in seen:
                continue
            seen.add(block)
            here = self.blocks[block]
            classes = classes + here.classes
            if here.last.base == "RET":
                return classes
            for following in here.after:
                heapq.heappush(waiting, (length + len(here.instructions), following, classes))
        raise Unreadable("a subroutine that does not return")

    def names(self, blocks: Iterable[int]) -> Counter:
        """The instructions of these blocks by name."""
        return Counter(i.name for b in blocks for i in self.blocks[b].instructions)

    def whole(self, passes: Callable[[Counter], float]) -> Counter:
        """What a thread executes of a kernel, by name: the longest way from its begin to its end that meets all matrix
        instructions, or where there are none all stores. So what masks may skip counts, and what is there for numbers
        that are not finite does not. passes: of a loop on this way, by the names of the instructions in it."""
        bases = {b: by_base(self.names([b])) for b in self._order}
        kinds = MATRIX if any(names[kind] for names in bases.values() for kind in MATRIX) else ("STG",)
        most = {b: any(names[kind] for kind in kinds) for b, names in bases.items()}
        times = dict.fromkeys(self._order, 1.0)
        for body in self.loops.values():
            count = passes(self.names(body))
            times |= {b: times[b] * count for b in body}
        place, best = {block: n for n, block in enumerate(self._order)}, {}
        for block in reversed(self._order):
            # A way around again ends here: what follows a loop is reached from where it is left.
            ways = [best[b] for b in self.blocks[block].after if place[b] > place[block]]
            met, length, names = max(ways, key=lambda way: way[:2], default=(0, 0.0, Counter()))
            here = Counter({name: times[block] * count for name, count in self.names([block]).items()})
            best[block] = met + most[block], length + here.total(), names + here
        met, _, names = best[0]
        if met != sum(most.values()):
            raise Unreadable(f"no way through the kernel meets all its {kinds[0]}")
        return names

    def cheapest_pass(self, work: Work) -> Pass:
        """The shortest pass that does this work, of the innermost loops of which one does."""
        found = self._passes(work, self.loops)
        if not found:
            raise Unreadable(f"no pass of a loop does exactly this: {work}")
        return min(found, key=lambda one: one.instructions)

    def _passes(self, work: Work, loops: dict[int, set[int]]) -> list[Pass]:
        able = {head for head in loops if self._is_able(head, work)}
        while able:
            innermost = {head for head in able if not able & self._within(head).keys()}
            found = [one for one in map(partial(self._pass, work), innermost) if one]
            if found:
                return found
            able -= innermost
        return []

    def _pass(self, work: Work, head: int) -> Pass | None:
        choices = [self._passes(inner, self._within(head)) for _, inner in work.loops]
        inside = [min(passes, key=lambda one: one.instructions) for passes in choices if passes]
        return self._shortest(head, self.loops[head], work, inside) if len(inside) == len(choices) else None

    def _within(self, head: int) -> dict[int, set[int]]:
        """The loops within a loop."""
        return {h: b for h, b in self.loops.items() if h != head and h in self.loops[head]}

    def _is_able(self, head: int, work: Work) -> bool:
        """Whether a loop has all kinds of this work, and loops within it those of the work's loops."""
        within = self._within(head)
        names = {i.name for b in self.loops[head] for i in self.blocks[b].instructions}
        own = [kind for kind, count in zip(work.kinds, work.counts.values(), strict=True) if count]
        return all(any(map(kind.match, names)) for kind in own) and all(
            any(self._is_able(other, inner) for other in within) for _, inner in work.loops
        )

    def _leading_to(self, goals: set[int], head: int) -> set[int]:
        """Blocks of a loop from which one can get to these within the same pass."""
        found, waiting = set(), list(goals)
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += self.before[block] if block != head else []
        return found

    def _following(self, block: int, body: set[int], done: dict) -> list[int]:
        """What may follow a block: not the way around others that do no work."""
        after = [other for other in self.blocks[block].after if other in body]
        for first, end in (after, after[::-1]) if len(after) == 2 else ():
            if self._optional(block, first, end, body, done):
                return [first]
        return after

    def _optional(self, block: int, first: int, end: int, body: set[int], done: dict) -> bool:
        """Whether all ways from `first` lead to `end`, past few instructions that are no work, and none comes there but
        by way of `block`."""
        found, waiting, length = {block}, [first], 0
        while waiting:
            one = waiting.pop()
            if one in found or one == end:
                continue
            found.add(one)
            length += len(self.blocks[one].instructions)
            after = self.blocks[one].after
            if length > MOST_OPTIONAL or any(done[one]) or not after or not set(after) <= body - {block}:
                return False
            waiting += after
        inside = found - {block}
        return first in inside and all(set(self.before[one]) <= found for one in inside)

    def _shortest(self, head: int, body: set[int], work: Work, inside: list[Pass]) -> Pass | None:
        """Dijkstra's algorithm over blocks and what has been done. inside: passes of the loops of the work, which are
        work as well."""
        wanted = (*work.counts.values(), *(1 for _ in inside))
        after, done, classes = {}, {}, {}
        for b in body:
            block, counts = self.blocks[b], self.blocks[b].work(work.kinds)
            done[b] = (*counts, *(0 for _ in inside))
            classes[b] = block.classes + (self._subroutine(block.calls) if block.calls else Counter())
        for b in body:
            after[b] = self._following(b, body, done)
        for inner in {one.path[0] for one in inside}:  # all its passes at once, then what comes after it
            within = self.loops[inner]
            outside = {a: None for b in within for a in self.blocks[b].after if a in body - within}
            after[inner], done[inner], classes[inner] = list(outside), tuple(0 for _ in wanted), Counter()
        for n, (one, (times, _)) in enumerate(zip(inside, work.loops, strict=True), len(work.counts)):
            inner = one.path[0]
            classes[inner] += Counter({kind: times * count for kind, count in one.classes.items()})
            done[inner] = tuple(count + (k == n) for k, count in enumerate(done[inner]))
        length = {b: c.total() for b, c in classes.items()}
        # By block, the kinds of work that are not to be had from there on.
        places = [self._leading_to({b for b in body if done[b][k]}, head) for k in range(len(wanted))]
        over = {b: [k for k, place in enumerate(places) if b not in place] for b in body}

        start = (head, tuple(0 for _ in wanted))
        waiting, best, came = [(0, start)], {start: 0}, {}
        while waiting:
            cost, state = heapq.heappop(waiting)
            if cost > best[state]:
                continue
            block, so_far = state
            if block == head and cost:
                path = []
                while state in came:
                    state = came[state]
                    path.append(state[0])
                return Pass(tuple(path[::-1]), sum((classes[b] for b in path), Counter()))
            now = tuple(map(int.__add__, so_far, done[block])) if any(done[block]) else so_far
            if any(map(int.__gt__, now, wanted)):
                continue
            for following in after[block]:
                if now != wanted and (following == head or any(now[k] < wanted[k] for k in over[following])):
                    continue
                reached, price = (following, now), cost + length[block]
                if price < best.get(reached, price + 1):
                    best[reached], came[reached] = price, state
                    heapq.heappush(waiting, (price, reached))
            if len(best) > MOST_STATES:
                raise Unreadable(f"too many ways around a loop: {work}")
        return None
