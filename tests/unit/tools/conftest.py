from tests.preparing import chinese, small_units, tokenizer  # noqa: F401  # fixtures
