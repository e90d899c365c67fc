from tests.preparing import (  # noqa: F401  # fixtures
    chinese,
    documents,
    make_job,
    prepared,
    run_import,
    run_prepare,
    small_units,
    tokenizer,
    units,
)
