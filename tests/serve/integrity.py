"""Whether every page, every adapter and everybody who runs or waits is where it should be, and nowhere else."""

from collections import Counter


def check(engine):
    """Raise an AssertionError unless they are."""
    check_arena(engine.arena)
    _check_wardrobe(engine.wardrobe)
    held = [page for sequence in engine.running for page in sequence.pages]
    assert sum(engine.arena.held.values()) == len(held), "pages are held by nobody who runs"
    assert not any(sequence.pages for sequence in engine.waiting), "who waits has pages"
    _check_order(engine.waiting, engine.running)
    users = [entry for sequence in engine.running for entry in sequence.entries]
    assert all(entry.users == users.count(entry) for entry in engine.wardrobe.kept), "adapters are worn by nobody"


def check_arena(arena):
    """Raise an AssertionError unless every page is in one place, and every name leads to its page."""
    places = [*arena.free, *arena.held, *arena.idle, *arena.given]
    assert sorted(places) == list(range(arena.count)), "a page is in two places, or in none"
    assert all(count > 0 for count in arena.held.values()), "a page is held by nobody"
    assert {page: name for name, page in arena.known.items()} == arena.names, "names and pages do not agree"
    assert all(page in arena.names for page in arena.idle), "a page without a name is kept"


def _check_wardrobe(wardrobe):
    """Every page that was given up is an adapter's, and every one has its own."""
    given = [page for entry in wardrobe.kept for page in entry.given]
    assert sorted(given) == sorted(wardrobe.arena.given), "pages were given up for nothing, or twice"
    assert all(entry.served is not None for entry in wardrobe.kept), "an adapter has pages and is not there"
    assert all(entry.users >= 0 for entry in wardrobe.kept), "an adapter is worn by fewer than nobody"
    assert not any(entry.gone and not entry.users for entry in wardrobe.kept), "an adapter that is gone has pages"


def _check_order(order, running):
    """All who run and wait are counted, and nobody else."""
    there = [*running, *order]
    assert order.tenants.there == Counter(each.tenant for each in there), "a tenant is there for nothing"
    worn = {(tenant, names): n for tenant, shares in order.worn.items() for names, n in shares.there.items()}
    assert worn == Counter((each.tenant, each.names) for each in there), "what is worn is there for nothing"
