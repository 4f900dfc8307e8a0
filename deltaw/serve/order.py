"""Whose turn is next, and when: fair shares, a turn for everybody, and no queue without an end.

Shares are those of virtual token counters (VTC; Sheng et al. 2024, arXiv:2401.00588): who was given least is next,
first among tenants, then among what a tenant's sequences wear. Who comes anew starts from the least of those who are
there, so that nobody saves up. What nobody wears yet costs its bytes too, so that batches wear few adapters; the longer
one waits, the less that counts (SGLang's drainer has the same bound).
"""

import heapq
import threading
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence as Row
from math import ceil, exp, inf
from time import monotonic

from deltaw.kernels.attention import SIDE
from deltaw.serve.arena import Arena
from deltaw.serve.sequence import Sequence

SAID = 2
"""How many tokens that are read one costs that is said."""
STARVED_SECONDS = 3.0
"""After so long, what an adapter costs keeps nobody waiting."""
LATE = 0.04
"""The share of promises that may be broken."""
RECENT_SECONDS = 10.0
"""How far back speed is measured."""
Rank = tuple[int, float, int, float, float]


class Later(Exception):
    """Not now; `seconds`: after which it is worth while to ask again."""

    def __init__(self, why: str, seconds: int) -> None:
        super().__init__(f"{why} Ask again in {seconds} s.")
        self.seconds = seconds


class Busy(Later):
    """The first token would come too late."""


class Shares:
    """What each of those who are there was given, in tokens."""

    def __init__(self) -> None:
        self.spent, self.there = dict[Hashable, float](), Counter[Hashable]()

    def come(self, who: Hashable) -> None:
        """One more request of theirs is there."""
        if not self.there[who]:
            least = min((self.spent[other] for other in self.there), default=0.0)
            self.spent[who] = max(self.spent.get(who, 0.0), least)
        self.there[who] += 1

    def go(self, who: Hashable) -> None:
        """One fewer is."""
        self.there[who] -= 1
        if not self.there[who]:
            del self.there[who]
        if not self.there:
            self.spent.clear()


class Order:
    """Sequences that wait, by tenant and by what they wear. Only `admit` may be asked by any thread."""

    def __init__(self, arena: Arena, most: int) -> None:
        self.arena, self.most = arena, most
        self.queues: dict[Hashable, list[Sequence]] = {}
        self.tenants, self.worn = Shares(), defaultdict[str, Shares](Shares)
        self.expected = Counter[Hashable]()
        """Tokens that will have been read and said by those who were admitted and have not begun: of all, of each
        tenant, and of each of what its sequences wear."""
        self.said = 64.0
        """How long an answer is."""
        self.done = self.seconds = 0.0
        """Tokens that were computed lately when there was enough to do, and the time it took."""
        self.slack = 1.0
        """By how much longer it takes than reckoned, so that LATE are late only: others overtake, steps are whole."""
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in list(self.queues.values()):
            yield from list(queue)

    def admit(self, sequences: Row[Sequence], within: float = inf) -> None:
        """Expect these, which are of one request.

        Raises:
            Busy: in that case the first token would not be there within so many seconds.
        """
        with self.lock:
            if (seconds := self.wait(sequences[0])) > within:
                raise Busy("All is taken: an answer would begin too late.", max(1, ceil(seconds - within)))
            sequences[0].promised = seconds
            for sequence in sequences:
                self._expect(sequence, self._cost(sequence))

    def wait(self, sequence: Sequence) -> float:
        """In how many seconds the first token of another sequence like this would come.

        Others of its tenant, or with what it wears, are before it; of all others only as much as makes shares equal.
        """
        every, tenant, worn = (self.expected[who] for who in _whose(sequence))
        own = min(tenant, worn * _with(self.worn.get(sequence.tenant), sequence.names))
        ahead = min(every, own * _with(self.tenants, sequence.tenant))
        # Where nobody waits, nobody is refused.
        return self.slack * (ahead + len(sequence.asked)) * self.seconds / self.done if ahead and self.done else 0.0

    def enter(self, sequence: Sequence) -> None:
        """One more waits."""
        self.tenants.come(sequence.tenant)
        self.worn[sequence.tenant].come(sequence.names)
        if not sequence.expected:
            self.admit([sequence])
        self.put(sequence)

    def put(self, sequence: Sequence) -> None:
        """It waits, for the first time or again."""
        queue = self.queues.setdefault((sequence.tenant, sequence.names), [])
        insort(queue, sequence, key=lambda each: (each.priority, each.urgency, each.since))

    def take(self, sequence: Sequence) -> None:
        """It waits no longer."""
        who = sequence.tenant, sequence.names
        self.queues[who].remove(sequence)
        if not self.queues[who]:
            del self.queues[who]

    def begin(self, sequence: Sequence) -> None:
        """Its turn has come: what it takes to begin is charged, the first time."""
        if sequence.expected:
            self.charge(sequence, len(sequence.asked) + self._bytes(sequence, but=1))
        self._expect(sequence, -sequence.expected)
        sequence.passed = None  # it has had its turn
        self.take(sequence)

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """It was given so many tokens."""
        self.tenants.spent[sequence.tenant] += tokens
        self.worn[sequence.tenant].spent[sequence.names] += tokens

    def heard(self, sequence: Sequence) -> None:
        """Its first token is said: whether in time tells how much later than reckoned others are to expect theirs."""
        if self.done and sequence.promised > self.seconds / self.done * self._cost(sequence):
            late = monotonic() - sequence.since > sequence.promised
            self.slack = min(4.0, max(0.5, self.slack * exp(0.1 * (late - LATE))))

    def gone(self, sequence: Sequence) -> None:
        """It has ended."""
        self._expect(sequence, -sequence.expected)
        self.said += 0.05 * (len(sequence.said) - self.said) * bool(sequence.said)
        self.tenants.go(sequence.tenant)
        self.worn[sequence.tenant].go(sequence.names)
        if not self.worn[sequence.tenant].there:
            del self.worn[sequence.tenant]

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of a full batch, or with half as much of prompts as fits, computed so many tokens."""
        kept = exp(-seconds / RECENT_SECONDS)
        self.done, self.seconds = self.done * kept + tokens, self.seconds * kept + seconds

    def turns(self, begun: Iterable[Sequence] = ()) -> Iterator[Sequence]:
        """Those that wait, and those that have `begun` and whose prompts are not whole yet, as their turns come.

        What is begun, charged and taken meanwhile counts for the next.
        """
        now = monotonic()
        heap = [(self._rank(queue[0], now), n, queue) for n, queue in enumerate(self.queues.values())]
        heap += [(self._rank(each, now, begun=True), -1 - n, [each]) for n, each in enumerate(begun)]
        heapq.heapify(heap)
        while heap:
            rank, n, queue = heapq.heappop(heap)
            if n >= 0 and queue:
                rank = self._rank(queue[0], now)  # it may be later by now
            if heap and rank > heap[0][0]:
                heapq.heappush(heap, (rank, n, queue))
            elif queue:
                head = queue[0]
                yield head
                if n >= 0 and queue and queue[0] is not head:
                    heapq.heappush(heap, (self._rank(queue[0], now), n, queue))

    def next(self, count: int) -> list[Sequence]:
        """So many that are next, one of each tenant and of what it wears."""
        return heapq.nsmallest(count, (q[0] for q in self.queues.values()), key=lambda s: self._rank(s, monotonic()))

    def _rank(self, sequence: Sequence, now: float, begun: bool = False) -> Rank:
        counts = max(0.0, 1 - (now - sequence.since) / STARVED_SECONDS)
        spent = self.worn[sequence.tenant].spent[sequence.names] + counts * self._bytes(sequence)
        return (sequence.priority, self.tenants.spent[sequence.tenant], sequence.urgency,
                -1.0 if begun else spent, sequence.since)  # fmt: skip

    def _cost(self, sequence: Sequence) -> int:
        return len(sequence.asked) + SAID * min(sequence.sampling.max_new_tokens, round(self.said))

    def _bytes(self, sequence: Sequence, but: int = 0) -> int:
        """The memory of what nobody wears, `but` itself, in tokens whose keys and values take as much."""
        return SIDE * sum(self.arena.pages_for(e.size_bytes) for e in {*sequence.entries} if e.users <= but)

    def _expect(self, sequence: Sequence, tokens: int) -> None:
        with self.lock:
            sequence.expected += tokens
            for who in _whose(sequence):
                self.expected[who] += tokens
                if not self.expected[who]:
                    del self.expected[who]


def _with(shares: Shares | None, who: Hashable) -> int:
    """How many there are, once this one is."""
    return 1 if shares is None else len(shares.there) + (who not in shares.there)


def _whose(sequence: Sequence) -> tuple[Hashable, ...]:
    return (), (sequence.tenant,), (sequence.tenant, sequence.names)
