"""Whose turn is next, and when: fair shares, a turn for everybody, and no queue without an end.

Shares are those of virtual token counters (VTC; Sheng et al. 2024, arXiv:2401.00588) that know how long answers are
expected to be: who was given least is next, first among tenants, then among what a tenant's sequences wear. Who comes
when nothing of theirs waits starts from the least of those who wait; of what they did not ask for before, only their
share of the last seconds is saved up. What nobody wears yet costs its bytes too, so that batches wear few adapters; the
longer one waits, the less that counts (SGLang's drainer has the same bound).

How long one would wait is found by going through the turns of those who wait, without anything coming of it.
"""

import heapq
from bisect import insort
from collections import ChainMap, Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, MutableMapping, Sequence as Row
from itertools import chain
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
        self.spent: MutableMapping[Hashable, float] = {}
        self.there = Counter[Hashable]()
        self.level = 0.0
        """What the last one had been given whose turn came."""

    def aside(self) -> "Shares":
        """The same, to see what would be: what changes there does not here."""
        other = Shares()
        other.spent, other.there, other.level = ChainMap({}, self.spent), self.there.copy(), self.level
        return other

    def come(self, who: Hashable, waiting: Collection[Hashable], saved: float = 0.0) -> None:
        """One more request of theirs is there, beside others that wait; they may have saved so much up."""
        if who not in waiting:
            least = min((self.spent[other] for other in waiting), default=self.level)
            self.spent[who] = max(self.spent.get(who, least), least - saved)
        self.there[who] += 1

    def go(self, who: Hashable) -> None:
        """One fewer is."""
        self.there[who] -= 1
        if not self.there[who]:
            del self.there[who]
        if not self.there:
            self.spent.clear()


class Order:
    """Sequences that wait, by tenant and by what they wear, while at most so many are `running`."""

    def __init__(self, arena: Arena, most: int, running: Row[Sequence]) -> None:
        self.arena, self.most, self.running = arena, most, running
        self.queues: dict[tuple[str, tuple[str, ...]], list[Sequence]] = {}
        self.tenants, self.worn = Shares(), defaultdict[str, Shares](Shares)
        self.said = 64.0
        """How long an answer is."""
        self.done = self.seconds = 0.0
        """Tokens that were computed lately when there was enough to do, and the time it took."""
        self.margin = 0.0
        """Seconds that are added to what is reckoned, so that LATE are late only: others come, answers are longer."""

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable([*queue] for queue in [*self.queues.values()])

    @property
    def share(self) -> float:
        """A tenant's share of the places."""
        return self.most / max(1, len(self.tenants.there))

    def enter(self, sequences: Row[Sequence], within: float = inf) -> None:
        """Let these wait, which are of one request.

        Raises:
            Busy: in that case the first token would not be there within so many seconds.
        """
        if within < inf:
            self.margin = min(self.margin, 0.9 * within)  # else nobody is let in from whom it could learn
            if (seconds := self.wait(sequences[0])) > within:
                raise Busy("All is taken: an answer would begin too late.", max(1, ceil(seconds - within)))
            sequences[0].promised = seconds
        for sequence in sequences:
            self._come(sequence)

    def wait(self, sequence: Sequence) -> float:
        """In how many seconds its first token would be there, if it came now and nobody after it.

        Before that, prompts are read whose turn is before its own, and so many answers end that it has a place, unless
        it has one by its tenant's share; meanwhile all places say a token in each step.
        """
        order = self._aside()
        order._come(sequence)
        before = order._before(sequence)
        own = 1 + sum(each.tenant == sequence.tenant for each in {*self.running, *before})
        rounds, place = divmod(len({*before}.difference(self.running)), self.most)
        ends = [0.0] * (self.most - len(self.running)) + sorted(map(self._left, self.running))
        steps = 0.0 if own <= order.share < self.most else ends[place] + rounds * self.said
        read = sum(each.pending for each in before)
        if not read + steps or not self.done:
            return 0.0  # where nobody is before it, nobody is refused
        tokens = read + len(sequence.asked) + SAID * self.most * (steps + 1)
        return tokens * self.seconds / self.done + (self.margin if steps else 0.0)

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
        """Its turn has come: the first time, it is charged for what it takes to begin, and is expected to say."""
        if not sequence.charged:
            for shares, who in ((self.tenants, sequence.tenant), (self.worn[sequence.tenant], sequence.names)):
                shares.level = shares.spent[who]
            sequence.charged = ceil(self._left(sequence))
            self.charge(sequence, self._cost(sequence) + self._bytes(sequence, but=1))
        sequence.passed = None  # it has had its turn
        self.take(sequence)

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """It was given so many tokens."""
        self.tenants.spent[sequence.tenant] += tokens
        self.worn[sequence.tenant].spent[sequence.names] += tokens

    def spoken(self, sequence: Sequence) -> None:
        """It has said one more; whether the first came in time tells how much later others are to expect theirs."""
        if len(sequence.said) > sequence.charged:
            sequence.charged += 1
            self.charge(sequence, SAID)
        if len(sequence.said) == 1 and sequence.promised > self.margin:
            took = monotonic() - sequence.since
            self.margin = max(0.0, self.margin + 0.1 * took * ((took > sequence.promised) - LATE))

    def gone(self, sequence: Sequence) -> None:
        """It has ended."""
        self.charge(sequence, -SAID * max(0, sequence.charged - len(sequence.said)))
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

    def _come(self, sequence: Sequence) -> None:
        tenant, names = sequence.tenant, sequence.names
        saved = self.done / max(1, len(self.tenants.there))  # its share of what was computed lately
        self.tenants.come(tenant, {other for other, _ in self.queues}, saved)
        self.worn[tenant].come(names, {worn for other, worn in self.queues if other == tenant})
        self.put(sequence)

    def _aside(self) -> "Order":
        """The same, to see whose turn would be when."""
        order = Order(self.arena, self.most, self.running)
        order.queues = {who: [*queue] for who, queue in self.queues.items()}
        order.tenants, order.said, order.done = self.tenants.aside(), self.said, self.done
        order.worn |= {tenant: shares.aside() for tenant, shares in self.worn.items()}
        return order

    def _before(self, sequence: Sequence) -> list[Sequence]:
        """Those whose turn is before its own, with prompts that are not whole; they are taken away."""
        before = list[Sequence]()
        for each in self.turns([each for each in self.running if each.pending > 1]):
            if each is sequence:
                break
            before.append(each)
            if not each.pages:
                self.take(each)
                self.charge(each, self._cost(each))
        return before

    def _rank(self, sequence: Sequence, now: float, begun: bool = False) -> Rank:
        waited = now - sequence.since
        spent = self.worn[sequence.tenant].spent[sequence.names]
        spent += max(0.0, 1 - waited / STARVED_SECONDS) * self._bytes(sequence)
        # Whoever comes later may have been given less. That must not break what was promised before.
        due = 0 <= sequence.promised < 4 * waited
        return (sequence.priority, self.tenants.spent[sequence.tenant], sequence.urgency,
                -1.0 if begun or due else spent, sequence.since + sequence.promised)  # fmt: skip

    def _left(self, sequence: Sequence) -> float:
        """How many tokens it is to say yet; who has said as many as is usual is expected to say as many again."""
        said, most = len(sequence.said), sequence.sampling.max_new_tokens
        return min(most - said, self.said - said if said < self.said else self.said)

    def _cost(self, sequence: Sequence) -> float:
        return len(sequence.asked) + SAID * ceil(self._left(sequence))

    def _bytes(self, sequence: Sequence, but: int = 0) -> int:
        """The memory of what nobody wears, `but` itself, in tokens whose keys and values take as much."""
        return SIDE * sum(self.arena.pages_for(e.size_bytes) for e in {*sequence.entries} if e.users <= but)
