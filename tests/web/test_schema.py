"""What the server's own description (OpenAPI) allows and forbids, asked at random: no answer of another kind."""

from functools import partial
from itertools import product

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serve.integrity import check
from web.hubs import running, saved

from deltaw.settings import Serving

ASKED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def described(base, tmp_path_factory):
    home = tmp_path_factory.mktemp("described")
    saved(base, home / "personas" / "poet.safetensors", "lora", {"rank": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(home / "cache"))
        with running(base, [home / "personas"], Serving(port=0, budget_gb=0.02)) as (url, hub):
            yield schemathesis.openapi.from_url(f"{url}/openapi.json")
            hub.service.do(partial(check, hub.service.engine)).result(10)


def test_every_answer_is_one_that_is_told_of(described, subtests):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 12
    for operation, mode in product(operations, schemathesis.GenerationMode):
        if mode.value == "negative" and not operation.body:
            continue  # there is nothing to get wrong
        with subtests.test(f"{operation.label}, {mode.value}"):

            @ASKED
            @given(case=operation.as_strategy(generation_mode=mode))
            def asked(case):
                # What is well formed may make no sense, such as a persona that is not there.
                case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

            asked()
