from whet.data.examples import Example, merge_turns

A, B = ({"role": "assistant", "content": text} for text in "ab")
Q = {"role": "user", "content": "q"}
CHOSEN = [("user", "q"), ("assistant", "a")]


def test_a_key_tells_apart_whatever_is_learned_differently():
    call = {"function": {"name": "f", "arguments": {}}}
    examples = [
        Example("x", (Q, A)),
        Example("x", (Q, A), desirable=True),
        Example("x", (Q, A), desirable=False),
        Example("x", (Q, A), rejected=(Q, B)),
        Example("x", (Q, A), tools=({"name": "f"},)),
        Example("x", (Q, {**A, "tool_calls": [call]})),
        Example("x", (Q, {**A, "reasoning_content": "r"})),
        Example("x", text="t"),
        Example("x", input_ids=(1, 2), labels=(1, 2)),
    ]
    assert len({example.key for example in examples}) == len(examples)
    assert examples[0].key == Example("y", ({**Q, "input": ""}, A), notes=("n",)).key


def test_the_answer_and_what_stands_before_it():
    example = Example("x", (Q, A, {**Q, "content": "r"}, B))
    assert example.answer == "b" and example.prompt_key == repr([*CHOSEN, ("user", "r")])
    assert (Example("x", text="t").answer, Example("x", text="t").prompt_key) == ("t", "")


def single(number, question="q", answer="a", **rest):
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(f"f.jsonl:{number}", turns, **rest)


def test_single_turns_are_joined_in_their_order():
    examples = [single(n, f"q{n}", f"a{n}", notes=(f"n{n}",)) for n in range(1, 6)]
    assert list(merge_turns(examples, 1)) == examples
    three, two = merge_turns(examples, 3)
    assert [m["content"] for m in three.messages] == ["q1", "a1", "q2", "a2", "q3", "a3"]
    assert (three.where, three.notes) == ("f.jsonl:1 to 3", ("n1", "n2", "n3"))
    assert (two.where, len(two.messages)) == ("f.jsonl:4 to 5", 4)
    apart = merge_turns([single(9), Example("g.parquet row 1", single(1).messages)], 2)
    assert [example.where for example in apart] == ["f.jsonl:9 to g.parquet row 1"]


def test_what_is_no_single_turn_passes_and_ends_what_was_begun():
    system = {"role": "system", "content": "s"}
    long = Example("f.jsonl:3", (Q, A, Q, A))
    others = [
        Example("f.jsonl:4", text="t"), single(5, tools=({"name": "f"},)),
        single(6, desirable=True), single(7, rejected=(Q, B)),
    ]  # fmt: skip
    own = [Example(f"f.jsonl:{n}", (system, Q, A)) for n in (8, 9)]
    found = list(merge_turns([single(1), single(2), long, *others, *own, single(10)], 4))
    assert [example.where for example in found] == [
        "f.jsonl:1 to 2", "f.jsonl:3", "f.jsonl:4", "f.jsonl:5", "f.jsonl:6", "f.jsonl:7",
        "f.jsonl:8 to 9", "f.jsonl:10",
    ]  # fmt: skip
    assert [m["role"] for m in found[6].messages].count("system") == 1
