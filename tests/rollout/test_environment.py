"""Environments of text at the edge of tokens, with several tokenizers and templates; and how they are found."""

from __future__ import annotations

import numpy as np
import pytest
import templates
from kinds import NAMES, tokenizer

import tiny
from luthier.data.chat import Rendering
from luthier.data.schemas import RowError
from luthier.errors import UserError
from luthier.rollout import environment, text
from luthier.rollout.calculator import Calculator
from luthier.rollout.environment import Answer, Edge, SingleTurn, TextEnvironment
from luthier.rollout.prompts import Prompt

WORDS = tiny.tokenizer()
EDGE = Edge(WORDS, Rendering(), (WORDS.eos_token_id,))
ASKED = ({"role": "user", "content": "guess"},)
PROMPT = Prompt("row 1", ASKED, "guess", row={"secret": 7})


class Guess(TextEnvironment):
    """Says whether the number guessed is too small."""

    def __init__(self, edge, bonus=0.0):
        super().__init__(edge)
        self.bonus = bonus

    def start(self, prompt):
        self.secret = prompt.row["secret"]

    def answer(self, reply):
        self.seen = reply
        if reply.strip() == str(self.secret):
            return Answer(reward=1.0 + self.bonus, done=True)
        return Answer(messages=[{"role": "user", "content": "Higher."}], reward=0.0)


def tokens(words: str) -> np.ndarray:
    return np.array(WORDS(words)["input_ids"], np.int32)


def test_messages_stand_where_the_template_puts_them():
    guess = Guess(EDGE)
    assert guess.reset(PROMPT) is None
    reply = tokens("3<|im_end|>")
    seen = guess.step(reply)
    assert guess.seen == "3"
    assert (seen.reward, seen.done) == (0.0, False)
    turns = [*ASKED, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Higher."}]
    whole = WORDS.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    asked = WORDS.apply_chat_template(list(ASKED), add_generation_prompt=True)["input_ids"]
    assert [*asked, *reply.tolist(), *seen.tokens] == whole
    cut = guess.step(tokens("3"))  # by a stop text: the end token is not there yet
    assert [*asked, *tokens("3").tolist(), *cut.tokens] == whole
    end = guess.step(tokens("7<|im_end|>"))
    assert (len(end.tokens), end.reward, end.done) == (0, 1.0, True)


@pytest.mark.parametrize("template", ["CHATML", "MARKED", "STRIPS_THINKING", "EMPTY_THINKING_LAST", "LLAMA3"])
@pytest.mark.parametrize("name", ["byte-level", "byte fallback", "llama-like", "smollm2"])
def test_an_answer_by_the_template_is_what_follows_the_reply_in_the_whole_text(name, template):
    words, how = tokenizer(name), Rendering(getattr(templates, template))
    answer = [{"role": "tool", "content": "84"}, {"role": "user", "content": "go on"}]
    turns = [*ASKED, {"role": "assistant", "content": "so it is"}, *answer]
    whole = words.apply_chat_template(turns, chat_template=how.template, add_generation_prompt=True, tokenize=False)
    behind = whole.partition("so it is")[2]
    found = text.encode_answer(words, how, ASKED, None, answer, None)
    assert words.decode(found, skip_special_tokens=False).strip() == behind.strip()
    # The model's own end token, which the template prints too, is not said twice.
    assert text.encode_answer(words, how, ASKED, None, answer, found[0]) == found[1:]
    assert text.encode_answer(words, how, ASKED, None, answer, found[-1] if found[-1] != found[0] else None) == found


def test_without_a_template_contents_are_joined():
    found = text.encode_answer(WORDS, Rendering(use_chat_template=False), ASKED, None, [ASKED[0]], WORDS.eos_token_id)
    assert WORDS.decode(found) == "\nguess"


def test_a_template_that_cannot_go_on_says_so():
    with pytest.raises(RowError, match="roles must alternate"):
        text.encode_answer(
            WORDS, Rendering(templates.ALTERNATING), ASKED, None, [{"role": "tool", "content": ""}], None
        )
    once = "{{ messages[-1]['content'] }}"
    with pytest.raises(RowError, match="prints a reply 0 times"):
        text.encode_answer(WORDS, Rendering(once), ASKED, None, [ASKED[0]], None)


@NAMES
@pytest.mark.parametrize("inserted", ["<result>84</result>", " 84", "\n84\n", "\n\n84", "été 🦊"])
def test_a_text_goes_on_from_other_tokens_as_it_is_written(name, inserted):
    words = tokenizer(name)
    before = words("12 = ", add_special_tokens=False)["input_ids"]
    found = text.encode_more(words, inserted)
    if name == "byte fallback" or all(token is not None for token in words.convert_ids_to_tokens(found)):
        shown = words.decode([*before, *found], clean_up_tokenization_spaces=False)
        alone = words.decode(before, clean_up_tokenization_spaces=False)
        assert shown[len(alone) :] == inserted


def test_text_and_messages_at_once_are_refused():
    class Both(TextEnvironment):
        def answer(self, reply):
            return Answer(text="a", messages=ASKED)

    both = Both(EDGE)
    both.reset(PROMPT)
    with pytest.raises(ValueError, match="both a text and messages"):
        both.step(tokens("x"))


OWN = """
from luthier.rollout.environment import Answer, Observation, TextEnvironment

class Echo(TextEnvironment):
    def __init__(self, edge, times=1):
        super().__init__(edge)
        self.times = 1 // times
    def answer(self, reply):
        return Answer(text=reply * self.times)

class Half(TextEnvironment):
    pass

class Other:
    def __init__(self, edge): ...
    def reset(self, prompt): ...

number = 3
"""


def test_environments_are_found(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert environment.load("", {}, EDGE) is SingleTurn
    first, second = (environment.load("calculator", {"instructions": ""}, EDGE)() for _ in range(2))
    assert isinstance(first, Calculator)
    assert first is not second
    assert isinstance(environment.load("luthier.rollout.calculator.Calculator", {}, EDGE)(), Calculator)
    make = environment.load(f"{tmp_path}/own.py:Echo", {"times": 1}, EDGE)
    assert make().answer("ab").text == "ab"


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("calculater", {}, ["environment=calculater", "no built-in environment", "Did you mean `calculator`?"]),
        ("{own}:Ecko", {}, ["Ecko", "Did you mean `Echo`?"]),
        ("{own}:number", {}, ["`number` is a int"]),
        ("{own}:Echo", {"tmies": 2}, ["environment_kwargs={'tmies': 2}", "unexpected keyword argument 'tmies'"]),
        ("{own}:Echo", {"times": 0}, ["environment_kwargs={'times': 0}", "ZeroDivisionError", "own.py, line 7"]),
        ("{own}:Half", {}, ["Half", "abstract", "answer"]),
        ("{own}:Other", {}, ["it lacks `step`", "TextEnvironment"]),
    ],
)
def test_what_is_no_environment_is_one_message(path, settings, words, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError) as refused:
        environment.load(path.format(own=tmp_path / "own.py"), settings, EDGE)
    assert all(word in str(refused.value) for word in words), refused.value


def test_openings_are_the_environment_s_prompts_or_the_rows():
    own = environment.openings(lambda: Calculator(EDGE), [PROMPT], [[1, 2]])
    assert own == [Calculator(EDGE).reset(PROMPT)]
    assert environment.openings(SingleTurn, [PROMPT], [[1, 2]]) == [[1, 2]]
    with pytest.raises(UserError, match=r"row 9: environment cannot begin with this row: KeyError: 'secret'.*line"):
        environment.openings(lambda: Guess(EDGE), [Prompt("row 9", ASKED, "guess")], [[1]])
