"""Texts as tokens: what counts of them, and what is refused."""

import pytest
from datasets import Dataset
from families import tokenizer
from transformers import AutoTokenizer

from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.fitting.texts import split, texts_of


TOKENIZER = tokenizer()
REAL = AutoTokenizer.from_pretrained(FAMILY / "reader")
TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'][0] + m['content'] + '<eos>' + 'Q' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>a' }}{% endif %}"
)


def with_template():
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def counted(text) -> str:
    return TOKENIZER.decode(list(text.ids[text.first :]))


def test_of_a_string_all_but_the_first_token_counts():
    (text,) = texts_of(["abcd"], TOKENIZER)
    assert (counted(text), text.count, text.size) == ("bcd", 3, 3)


def test_of_a_pair_only_the_answer_counts():
    (text,) = texts_of([("abc", "de")], TOKENIZER)
    assert (counted(text), text.first, text.size) == ("de", 3, 2)


def test_a_token_with_letters_of_both_belongs_to_the_answer():
    """As a prompt that ends in a space does, where the space is a part of the next word's token."""
    prompt, answer = "How many? ", "She has 3 pens."
    (text,) = texts_of([(prompt, answer)], REAL)
    assert list(text.ids) == REAL(prompt + answer)["input_ids"]
    said = REAL.decode(list(text.ids[text.first :]))
    assert said.strip() == answer and len(said) <= len(answer) + 1


def test_of_a_chat_the_last_turn_and_its_end_count():
    turns = [{"role": "user", "content": "bc"}, {"role": "assistant", "content": "de"}]
    (text,) = texts_of([turns], with_template())
    assert counted(text) == "de<eos>" and text.size == 2  # and not the Q after it, which no model writes
    assert texts_of([("bc", "de")], with_template(), chat_template=True) == [text]


def test_rows_have_columns():
    rows = [{"q": "abc", "a": "de"}, {"q": "ab", "a": "fg"}]
    expected = texts_of([("abc", "de"), ("ab", "fg")], TOKENIZER)
    assert texts_of(rows, TOKENIZER, columns=("q", "a")) == expected
    assert texts_of(Dataset.from_list(rows), TOKENIZER, columns=["q", "a"]) == expected
    assert texts_of(Dataset.from_list(rows), TOKENIZER, columns="q") == texts_of(["abc", "ab"], TOKENIZER)
    chats = [{"messages": [{"role": "user", "content": "bc"}, {"role": "assistant", "content": "de"}]}]
    assert texts_of(Dataset.from_list(chats), with_template(), columns="messages")[0].count == 3


def test_long_texts_are_cut_where_that_is_asked_for():
    with pytest.warns(UserWarning, match="1 of 2 texts are cut to 5 tokens"):
        one, two = texts_of([("abc", "defgh"), ("a", "b")], TOKENIZER, max_length=5)
    assert (counted(one), one.size, counted(two)) == ("de", 2, "b")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([], {}, "no texts"),
        (["ab", " "], {}, "Text 1 is empty"),
        (["a"], {}, "one token only"),
        ([("ab", "")], {}, "Text 0 has an empty answer"),
        ([("", "ab")], {}, "empty prompt"),
        ([{"q": "ab"}], {}, "say which to read with `columns`"),
        ([{"q": "ab"}], {"columns": ("q", "a")}, "Text 0 has no 'a'"),
        (["ab"], {"columns": ("a", "b", "c")}, "`columns` must be a name or two"),
        ([[{"role": "user", "content": "a"}]], {}, "no chat template"),
        (["abcdef"], {"limit": 5}, "Text 0 has 6 tokens, but the members have 5 positions"),
        (["abcdef"], {"limit": 5, "max_length": 6}, "`max_length` .6. is more than"),
        ([("abcdef", "a")], {"max_length": 5}, "leaves nothing"),
    ],
)
def test_what_is_wrong_is_said(given, options, said):
    with pytest.raises(ValueError, match=said):
        texts_of(given, TOKENIZER, **options)


@pytest.mark.parametrize("given", ["abc", 3, [3], [("a", "b", "c")], [("a", 2)]])
def test_what_is_no_text_is_said(given):
    with pytest.raises(TypeError, match="must be a"):
        texts_of(given, TOKENIZER)


def test_a_chat_ends_with_the_assistant():
    turns = [{"role": "assistant", "content": "de"}, {"role": "user", "content": "bc"}]
    with pytest.raises(ValueError, match="must end with a turn of the assistant"):
        texts_of([turns], with_template())


def test_a_split_is_a_partition_and_the_same_for_a_seed():
    texts = texts_of([f"a{'b' * i}" for i in range(1, 21)], TOKENIZER)
    fitted, out = split(texts, 0.2, seed=1)
    assert len(out) == 4 and {*fitted, *out} == {*texts} and split(texts, 0.2, seed=1) == (fitted, out)
    assert split(texts, 0.2, seed=2) != (fitted, out)
    for share, some in ((0, texts), (1.0, texts), (0.5, texts[:1])):
        with pytest.raises(ValueError):
            split(some, share, seed=0)
