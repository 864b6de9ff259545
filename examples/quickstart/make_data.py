"""Write the quickstart data: restaurant booking messages and the JSON records they ask for.

A row is one short chat: the guest's message in plain language, and the record a booking system
can store, as one line of strict JSON with five keys (``note`` is null when there is none).
The messages are made here from templates, so the data carry no licence but this project's, need
no network, and come out byte for byte the same on every machine.

Training rows and held-out rows use separate lists of templates (and partly different names):
the held-out score then tells whether a model learnt the task, not the sentences.

Run ``python make_data.py`` to write train.jsonl and heldout.jsonl beside this file, and
``python make_data.py --check`` to verify that the files on disk are what it would write.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SEED = 2026
TRAIN_ROWS = 600
HELDOUT_ROWS = 80
NOTE_RATE = 0.4  # how often the optional part of a template is kept

# A template is one message. {name}, {people}, {day} and {time} are always there; a part in square
# brackets is optional, holds the note, and may offer several wordings split by "|". The kind of
# note a wording takes is the name of its slot: {want}, {fact} or {event}. A template written
# without capitals gives a message without capitals, as in a text sent from a phone.
TRAIN_TEMPLATES = (
    "Dear team, please reserve for {people} on {day} at {time}.[ One guest has {fact}.] {name}",
    "Dear team, a table for {people}, {time} on {day}.[ We need {want}.] Regards, {name}",
    "Good morning, I want to book for {people}, {day} at {time}.[ Could we have {want}?] {name}",
    "Hello, could you fit in {people} on {day} at {time}?[ We celebrate {event}.] Thanks, {name}",
    "Hi! Table for {people} on {day} at {time}, please.[ With {want} if possible.] {name}",
    "Hi there, {name} here. We need a table {day} at {time} for {people}.[ It's for {event}.]",
    "My name is {name}. Book {day} at {time} for {people}[, with {want}|, I have {fact}].",
    "This is {name}, a table for {people}, {time} on {day}.[ My son has {fact}.]",
    "Could I reserve for {people} at {time} on {day}? Name is {name}.[ We want {want}.]",
    "Anything for {people} at {time} this {day}?[ We'd love {want}.] Thanks, {name}",
    "We would like to dine on {day} at {time}, {people}.[ Please note {fact}.] Yours, {name}",
    "On {day} we are {people}, eating at {time}.[ One of us has {fact}.] {name}",
    "Is {time} on {day} free for {people}?[ We will need {want}.] Book it for {name}.",
    "Booking for {name}: {people}, {day}, {time}[, {want}|, {fact}].",
    "{name}, {people}, {day} {time}[, {want}|, {event}]",
    "{day} {time}, {people}, under {name}[, {want} please]",
    "{day} at {time} for {people}. Name: {name}.[ Note: {fact}.| Note: {want}.]",
    "Name {name}. People: {people}. Day: {day}. Time: {time}.[ Extra: {want}.| {event}.]",
    "Request: {name}, {day}, {time}, {people}.[ Reason: {event}.| Needs {want}.]",
    "{people} for dinner on {day}, {time}, name of {name}.[ Any chance of {want}?]",
    "Please put {name} down for {day}, {time}, {people}.[ There is {fact} in the group.]",
    "Evening! Can you squeeze us in on {day}? {people}, {time}.[ {want}, please.] Cheers, {name}",
    "I'm {name}, I need a table at {time} on {day} for {people}[ because of {event}].",
    "Table at {time} next {day} for {people}, it's {name}.[ Can we get {want}?]",
    "Hello, this {day} at {time} we will be {people}.[ My wife has {fact}.] {name}",
    "Good afternoon. A table under {name} for {day}: {people}, {time}.[ We require {want}.]",
    "We're coming for {event} on {day} at {time}, {people}. It's for {name}.",
    "It's for {event}: {people} on {day} at {time}, under the name {name}.",
    "We have {event} on {day}. Table for {people} at {time}? Best, {name}",
    "With {want}, please: {people}, {day}, {time}. Signed {name}",
    "One of us has {fact}. Could you seat {people} at {time} on {day}? {name}",
    "Do you offer {want}? If so, book {people} for {day} at {time}. Name's {name}.",
    "Please keep {want} for us. {name}, {people}, {time} on {day}.",
    "A dinner for {people} on {day}, {time}.[ A guest has {fact}.] Sincerely, {name}",
    "I'd come on {day} with my family, {people}, at {time}.[ We need {want}.] {name}",
    "Dinner {day}? {people}, there by {time}.[ And {want}.] Ask for {name}.",
    "Good evening, {name} speaking. {time}, {day}, {people}.[ I also need {want}.]",
    "Hey, can I get a table {day} {time} for {people}?[ It's {event}!] I'm {name}",
    "Hey it's {name}! Got room for {people} on {day}, {time}?[ Also {fact}.]",
    "Hoping to book {people} in at {time}, {day}.[ Is {want} possible?] Contact: {name}",
    "hi can i book for {people} on {day} at {time}[, one has {fact}|, need {want}] thanks {name}",
    "hey table for {people} {day} {time} pls[, {want} too], its {name}",
    "hiya, {name} here, {people} on {day}, {time} ok?[ its {event}]",
    "need a tabel {day} {time}, {people}[, {want} if u can]. {name}",
    "{people} {day} {time} name {name}[ {want}| {event}]",
    "{name} {day} {time} {people}[ + {want}| ({fact})]",
    "its {name}, can we come {day} at {time}, {people}?[ got {fact} btw]",
    "any space {day} at {time}? {people}[, want {want}], for {name}",
    "book {people} for {time} {day} plz[, theres {fact}]. cheers {name}",
    "can u do {time} on {day} for {people}[ with {want}]? thx, {name}",
    "resrvation for {name} on {day} please, {people}, {time}[, {event}]",
    "yo got a spot {day} for {people} at {time}?[ celebrating {event}] - {name}",
    "we r {people}, coming {day} at {time}[, pls sort {want}], ask for {name}",
    "{time} {day} ok for {people}?[ need {want}.] im {name}",
    "hello, {day} evening, {time}, {people} pls. {name}[. my kid has {fact}]",
    "save us a table, {people}, {day} {time}, under {name}[, with {want}]",
    "me again, {name}. {people} on {day} this time, {time}[, and {want}]",
    "pls book {day} {time} {people} {name}[, note {fact}]",
    "would like {want} on {day} at {time} for {people}, {name}",
    "its {event} so {people} on {day} at {time} please, {name}",
    "i have {fact}, can i still book {day} {time} for {people}? {name}",
    "thinking of {day} at {time}, {people}[, {want} would be nice]. {name} x",
)
HELDOUT_TEMPLATES = (
    "Dear Sir or Madam, I wish to book for {people} at {time} on {day}.[ I need {want}.] {name}",
    "Good day, may we have a table on {day}, {time}, for {people}?[ A friend has {fact}.] {name}",
    "Hello! I'd love to bring {people} on {day} at {time}.[ Please prepare {want}.] From {name}",
    "Hi, it's {name}. Do you have room at {time} on {day} for {people}?[ We'd like {want}.]",
    "Are you able to seat {people} on {day} at {time}?[ We have {event}.] Thanks, {name}",
    "Please could {name} have a table for {people}, {time}, {day}?[ He has {fact}.]",
    "I am writing to reserve {day} at {time} for {people}[, with {want}]. My name is {name}.",
    "Table request. {people}, {day}, {time}, {name}.[ Remark: {fact}.| Remark: {want}.]",
    "{day}, {time}. {people}. {name}.[ {want}.]",
    "For {name}: a table on {day} at {time}, {people}[, plus {want}].",
    "Can you take {people} this {day}? We'd arrive at {time}.[ It is {event}.] Regards, {name}",
    "We plan {event} on {day}, {people}, from {time}. Reserve it under {name}.",
    "My daughter has {fact}. Is a table for {people} free {day} at {time}? {name}",
    "{name} would like a table for {people} on {day}, at {time}[, and asks for {want}].",
    "Looking for a table: {people}, next {day}, {time}.[ Must have {want}.] Thanks {name}",
    "heya, table {day} at {time} for {people}?[ someone has {fact}] ta, {name}",
    "hello its {name}, wanna book {time} {day}, {people}[, {want} pls]",
    "{name} for {day} {time}, {people}[, {fact}]",
    "{people}, {time}, {day}[, need {want}]. name is {name}",
    "got a table {day} {time}? we are {people}[, its {event}]. {name}",
    "hi, pls reserv {day} at {time}, {people}[, we have {fact}]. from {name}",
    "could we do {day}, {time}, {people}[ and get {want}]? its for {name}",
    "pop us down for {time} on {day} pls, {people}, {name}[. oh and {want}]",
    "free on {day} at {time}? {people} coming[, {event}]. thx {name}",
)

FIRST_NAMES = (
    "Dana Tom Lucia Omar Hannah Sofia Marcus Ravi Chloe Peter Grace Nina Carlos Emily Sam Julia "
    "Patrick Rosa Ben Oscar Helen Ivan Maya Daniel Alice Hugo Leo Karen"
).split()
LAST_NAMES = (
    "Cole Baker Rossi Reed Patel Martin Silva Khan Murphy Clark Turner Lopez Chen Walsh Hughes "
    "Green Young Stone Park Wood Hall Price King Cook"
).split()
HELDOUT_FIRST_NAMES = (*FIRST_NAMES[:14], *"Laura Nora Simon David Emma Paul".split())
HELDOUT_LAST_NAMES = (*LAST_NAMES[:14], *"Wright Gray Hill Carter".split())

NOTES = {
    "want": (
        "a window seat;a high chair;a quiet corner;a vegan menu;a birthday cake;a parking space"
    ).split(";"),
    "fact": "a nut allergy;a dairy allergy;an egg allergy;a guide dog;a wheelchair".split(";"),
    "event": "a birthday;an anniversary;a graduation".split(";"),
}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine".split()
PEOPLE = range(2, 9)
HOURS = range(6, 9)  # guests arrive from 18:00 to 20:30, so "seven" is always 19:00


@dataclass(frozen=True)
class Source:
    """What one file is made from."""

    templates: Sequence[str]
    first_names: Sequence[str]
    last_names: Sequence[str]
    rows: int


@dataclass(frozen=True)
class Row:
    """One booking, and the template its message came from."""

    template: str
    message: str
    record: str

    def line(self) -> str:
        """Return the row as one line of JSON, as it stands in the file."""
        turns = (("user", self.message), ("assistant", self.record))
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages}) + "\n"


TRAIN = Source(TRAIN_TEMPLATES, FIRST_NAMES, LAST_NAMES, TRAIN_ROWS)
HELDOUT = Source(HELDOUT_TEMPLATES, HELDOUT_FIRST_NAMES, HELDOUT_LAST_NAMES, HELDOUT_ROWS)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one option; random() alone gives the same numbers under every Python version."""
    return options[int(rng.random() * len(options))]


def say_people(rng: random.Random, count: int, bare: bool) -> str:
    """Put a number of guests into words; a number alone only where the sentence makes it plain."""
    number = pick(rng, (str(count), NUMBERS[count]))
    forms = ["{} people", "{} guests", "a party of {}", "{} of us"]
    if bare:
        forms += ["{}", "{}", "the {} of us"]
    return pick(rng, forms).format(number)


def say_time(rng: random.Random, hour: int, half: bool, bare: bool) -> str:
    """Put an evening time into words, on the clock of 12 or 24 hours."""
    word = NUMBERS[hour]
    if half:
        forms = [f"{hour}:30pm", f"{hour}:30 pm", f"{hour + 12}:30", f"half past {word}"]
        return pick(rng, [*forms, f"{hour}:30", f"{hour}.30pm", f"{word} thirty"])
    forms = [f"{hour}pm", f"{hour} pm", f"{hour + 12}:00", f"{word} o'clock", f"{hour}:00pm"]
    return pick(rng, forms + [str(hour), word] if bare else forms)


def choose_part(rng: random.Random, template: str) -> str:
    """Keep one wording of the optional part of a template, or drop the part."""
    found = re.search(r"\[(.*?)\]", template)
    if found is None:
        return template
    part = pick(rng, found[1].split("|")) if rng.random() < NOTE_RATE else ""
    return template[: found.start()] + part + template[found.end() :]


def make_row(rng: random.Random, source: Source, template: str) -> Row:
    """Draw one booking and write it in the words of a template."""
    name = pick(rng, source.first_names)
    if rng.random() < 0.6:
        name += " " + pick(rng, source.last_names)
    people, day = pick(rng, PEOPLE), pick(rng, DAYS)
    hour, half = pick(rng, HOURS), pick(rng, (False, True))
    text = choose_part(rng, template)
    kind = next((kind for kind in NOTES if f"{{{kind}}}" in text), None)
    note = pick(rng, NOTES[kind]) if kind else None
    message = text.format(
        name=name,
        people=say_people(rng, people, bare="for {people}" in text),
        day=pick(rng, (day, day, day[:3])),
        time=say_time(rng, hour, half, bare="at {time}" in text),
        **({kind: note} if kind else {}),
    )
    record = {
        "name": name,
        "people": people,
        "day": day,
        "time": f"{hour + 12}:{'30' if half else '00'}",
        "note": note and re.sub("^an? ", "", note),
    }
    if template == template.lower():
        message = message.lower()
    else:
        message = re.sub(r"(^|[.!?] )[a-z]", lambda start: start[0].upper(), message)
    return Row(template, message, json.dumps(record, separators=(",", ":")))


def make_rows(source: Source, seed: int, taken: set[str]) -> list[Row]:
    """Make the rows of one file, each template in turn; no message is in taken or comes twice."""
    rng = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < source.rows:
        row = make_row(rng, source, source.templates[len(rows) % len(source.templates)])
        if row.message not in taken:
            taken.add(row.message)
            rows.append(row)
    return sorted(rows, key=lambda row: rng.random())


def make_files() -> dict[str, str]:
    """Return the text of every file by its name."""
    taken: set[str] = set()
    train, heldout = make_rows(TRAIN, SEED, taken), make_rows(HELDOUT, SEED + 1, taken)
    assert {row.template for row in train}.isdisjoint(row.template for row in heldout)
    return {
        "train.jsonl": "".join(row.line() for row in train),
        "heldout.jsonl": "".join(row.line() for row in heldout),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files beside this script, or compare them; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the quickstart's train and held-out rows.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    check = parser.parse_args(argv).check
    status = 0
    for name, text in make_files().items():
        path = Path(__file__).resolve().parent / name
        if not check:
            path.write_bytes(text.encode())
        elif not path.is_file() or path.read_bytes() != text.encode():
            print(f"{name} differs from what make_data.py writes", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
