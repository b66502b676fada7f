"""Random layouts, rows and shapes: the sharded layer equals the unsharded one.

OPROJ_TEST_FUZZ_EXAMPLES is the number of examples in all (default 200); the processes are real
and live through all of them, so a rank that is left behind in one example fails the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import ranks
from tests.fuzz.pool import Pool

# (data-parallel size, tensor-parallel size, group size): every group size from 2 to 8.
LAYOUTS = [
    (2, 1, 2),
    (3, 1, 3),
    (4, 1, 4),
    (5, 1, 5),
    (6, 1, 6),
    (7, 1, 7),
    (8, 1, 8),
    (4, 1, 2),
    (6, 1, 3),
    (8, 1, 4),
    (2, 2, 2),
    (4, 2, 4),
    (4, 2, 2),
    (2, 3, 2),
    (2, 4, 2),
]
EXAMPLES = int(os.environ.get("OPROJ_TEST_FUZZ_EXAMPLES", "200"))
SECONDS_TO_START = 180
SECONDS_AN_EXAMPLE = 60
# Of the largest output: rounding of the partial results before they are summed.
# No float16: oneDNN, which vLLM multiplies with, does not know it on most CPUs.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2}

ROWS = st.one_of(st.just(0), st.integers(1, 8), st.integers(0, 512))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(8, tmp_path_factory.mktemp("fuzz")) as pool:
        yield pool


def examples(dp: int, tp: int, size: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.lists(
                st.one_of(
                    st.lists(ROWS, min_size=dp, max_size=dp),
                    ROWS.map(lambda count: [count] * dp),
                ),
                min_size=1,
                max_size=2,
            ),
            "columns": st.integers(1, 40).map(lambda width: width * tp * size),
            "hidden": st.integers(1, 96),
            "dtype": st.sampled_from(sorted(TOLERANCE)),
            "bias": st.booleans(),
            "skip_bias_add": st.booleans(),
            "told": st.booleans(),
            "parallel_input": st.booleans(),
            "buffer": st.sampled_from([500, 5000, 64 << 20]),
        }
    )


@pytest.mark.parametrize(("dp", "tp", "size"), LAYOUTS)
def test_equal_to_the_unsharded_layer(pool: Pool, dp: int, tp: int, size: int) -> None:
    pool.ask(
        "layout",
        {"dp": dp, "tp": tp, "size": size, "port": ranks.free_port()},
        SECONDS_TO_START,
    )

    ran = [0]

    @settings(
        max_examples=-(-EXAMPLES // len(LAYOUTS)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(dp, tp, size))
    def equal(example: dict[str, Any]) -> None:
        results = pool.ask("example", example, SECONDS_AN_EXAMPLE)
        ran[0] += 1
        for rank, result in enumerate(results[: dp * tp]):
            assert result["shard"] == [example["hidden"], example["columns"] // (tp * size)]
            assert result["exchanges"] == len(example["rows"])
            worst = max(result["errors"], default=0.0)
            assert worst <= TOLERANCE[example["dtype"]], (rank, worst, example)

    equal()
    print(f"{ran[0]} examples")
