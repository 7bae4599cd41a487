"""A small task with exact answers, made on the spot: a customer's message about a parcel -> one JSON object.

Every message is put together from parts (greeting, who writes, what happened, order and city, how urgent, goodbye), so the
answer is known by construction: nobody labelled anything, and no label is wrong. The idea to leave with: train and test
share no part. Each template, name, city, product and order number belongs to one of the two sides, so a good test score
means that the model understood messages it never saw, not that it remembers some.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Literal

from minisft.safe_json import JSON
from minisft.seeds import derive_seed

Split = Literal["train", "test"]
INTENTS = ("where_is", "damaged", "wrong_address", "return", "late", "missing_item")
INSTRUCTION = f"Answer with one JSON object: intent ({', '.join(INTENTS)}), order, name (or null), city, urgent."

NAME_SHARE = 0.75  # messages that say who writes; the others have the answer null
URGENT_SHARE = 0.4
TYPO_SHARE = 0.3
CASING_SHARE = 0.3


@dataclass(frozen=True)
class Phrasebook:
    """Everything one side may say. ``bodies`` maps an intent to its templates; ``{item}`` stands for a product."""

    greetings: tuple[str, ...]
    intros: tuple[str, ...]
    bodies: dict[str, tuple[str, ...]]
    details: tuple[str, ...]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    closings: tuple[str, ...]
    signatures: tuple[str, ...]
    names: tuple[str, ...]
    cities: tuple[str, ...]
    items: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


TRAIN = Phrasebook(
    greetings=("Hi,", "Hello,", "Hey,", "Dear team,", "Good morning,", "Hello there,", "Hi support,", "Greetings,"),
    intros=(
        "This is {name}.",
        "My name is {name}.",
        "{name} here.",
        "I'm {name}.",
        "{name} writing.",
        "You are talking to {name}.",
    ),
    bodies={
        "where_is": (
            "Where is my {item}?",
            "Can you tell me where my parcel is right now?",
            "I would like to know where the {item} is at the moment.",
            "Do you have tracking for my {item}?",
            "The tracking page shows nothing, where is my package?",
            "Could you look up the current location of my {item}?",
            "Which depot is my {item} in?",
            "I can't find my parcel on the tracking site, where is it?",
            "Has my {item} left the warehouse yet?",
            "Please send me a tracking link for the {item}.",
            "What is the status of my shipment?",
            "Just checking where my {item} is.",
            "Is the {item} on its way?",
            "Any news on where the package with the {item} is?",
        ),
        "damaged": (
            "My {item} arrived broken.",
            "The {item} has a big crack.",
            "The box was crushed and the {item} is in pieces.",
            "I opened the parcel and the {item} was smashed.",
            "The {item} came scratched all over.",
            "Water got into the box and ruined the {item}.",
            "The {item} you sent is dented.",
            "The package was torn and the {item} is damaged.",
            "The {item} does not work, it was damaged on the way.",
            "One side of the {item} is bent.",
            "The glass of the {item} is shattered.",
            "I got a broken {item}.",
            "Your driver dropped the box and the {item} broke.",
            "The {item} was cracked when I unpacked it.",
        ),
        "wrong_address": (
            "I gave you the wrong address.",
            "I typed the wrong street when I ordered the {item}.",
            "Please change the delivery address, I moved last week.",
            "The house number on my order is wrong.",
            "My {item} is going to my old address.",
            "I need to correct the address for the {item}.",
            "The postcode I entered is not right.",
            "Can you send the {item} to a different address?",
            "I forgot to update my address before ordering.",
            "The label shows a wrong street name.",
            "The address on the parcel is not mine.",
            "I put the wrong flat number on the order.",
            "Please use my new address for the {item}.",
            "The {item} was sent to an address where I no longer live.",
        ),
        "return": (
            "I want to send the {item} back.",
            "How do I return the {item}?",
            "I'd like to return my {item}, it does not fit.",
            "Please send me a return label.",
            "I changed my mind about the {item} and want my money back.",
            "The {item} is not what I expected, can I return it?",
            "I would like a refund for the {item}.",
            "Can I give the {item} back?",
            "I don't need the {item} any more, please take it back.",
            "What is the way to return a {item}?",
            "I don't like the colour of the {item}, I want to return it.",
            "I ordered the {item} twice and want to return one.",
            "The {item} is too small, I am sending it back.",
            "Please arrange a pickup, I am returning the {item}.",
        ),
        "late": (
            "My {item} should have been here last week.",
            "The {item} is late.",
            "You promised delivery on Monday and nothing came.",
            "I have been waiting three weeks for my {item}.",
            "The delivery date has passed and I have no {item}.",
            "My parcel is four days late.",
            "The {item} was due yesterday and did not come.",
            "Delivery of the {item} is delayed again.",
            "It was meant to arrive on Tuesday, it is still not here.",
            "The {item} still has not arrived after two weeks.",
            "You said two days, now it has been ten.",
            "Why does the delivery of my {item} take so long?",
            "My {item} is overdue.",
            "The promised date for the {item} was last Friday.",
        ),
        "missing_item": (
            "The box came but the {item} was not in it.",
            "One {item} is missing from my parcel.",
            "I ordered two, but there was only one {item} in the box.",
            "The {item} was missing when I opened the package.",
            "My parcel arrived without the {item}.",
            "Everything was there except the {item}.",
            "You forgot to pack the {item}.",
            "The package was empty, no {item} inside.",
            "I paid for three items and only got two, the {item} is missing.",
            "There is no {item} in the box you sent.",
            "Half of my order is missing.",
            "The {item} is on the invoice but not in the parcel.",
            "The parcel was incomplete, I did not get the {item}.",
            "A part of the {item} is missing from the box.",
        ),
    },
    details=(
        "Order {order}, delivery to {city}.",
        "My order number is {order} and I live in {city}.",
        "It is order {order} for {city}.",
        "I live in {city}, the order is {order}.",
        "Order number {order}, city {city}.",
        "Ref {order}, {city}.",
        "The order is {order}, shipped to {city}.",
        "I am in {city} and my order is {order}.",
        "That is {order}, to {city}.",
        "{city}, order {order}.",
        "My address is in {city}. Order: {order}.",
        "Order {order} ({city}).",
    ),
    urgent=(
        "This is urgent.",
        "I need it today!",
        "Please hurry.",
        "I need an answer right now.",
        "Please fix this as soon as possible.",
        "It is very urgent, the party is tomorrow.",
        "I can't wait any longer.",
        "Please reply at once.",
        "ASAP please!",
        "I need this solved before tonight.",
    ),
    calm=("No hurry.", "There is no rush.", "Take your time.", "It is not urgent.", "Whenever you have time.", "It can wait."),
    closings=("Thanks!", "Thank you.", "Best regards", "Please help.", "Bye", "Many thanks"),
    signatures=("Thanks, {name}", "Thank you, {name}", "Best regards, {name}", "- {name}", "Bye, {name}", "Yours, {name}"),
    names=_words(
        "Ada,Amir,Anna,Bea,Bruno,Carla,Chen,Clara,Dario,David,Dina,Elena,Emil,Erik,Eva,Farid,Felix,"
        "Fiona,Greta,Hana,Hugo,Ida,Ines,Ivan,Jakob,Jana,Julia,Kai,Karim,Laura,Leo,Lina,Luca,Maria,Marta,"
        "Max,Mei,Mila,Nadia,Nina,Noah,Olga,Oscar,Paul,Petra,Rosa,Ruth,Samir,Sara,Simon,Sofia,Stefan,"
        "Tara,Theo,Tom,Uma,Vera,Victor,Wanda,Yusuf,Zoe"
    ),
    cities=_words(
        "Athens,Bergen,Berlin,Bilbao,Boston,Brno,Cairo,Chicago,Cologne,Cork,Dallas,Delhi,Denver,Dublin,Geneva,Genoa,Ghent,Graz,"
        "Hamburg,Hanoi,Helsinki,Kyoto,Leeds,Leipzig,Lima,Lisbon,London,Lyon,Madrid,Malmo,Manila,Miami,Milan,Munich,Nairobi,"
        "New York,Osaka,Oslo,Ottawa,Paris,Perth,Porto,Prague,Quito,Riga,Rome,San Diego,Seattle,Seoul,Sydney,Tokyo,"
        "Toronto,Turin,Utrecht,Vienna,Warsaw,York,Zurich"
    ),
    items=_words("lamp,kettle,mug,mirror,backpack,chair,toaster,clock,phone case,jacket,camera,vase,blender,keyboard"),
)

TEST = Phrasebook(
    greetings=("Good evening,", "Hello team,", "Dear Sir or Madam,", "Good day,"),
    intros=("I am {name}.", "{name} speaking.", "It's {name}."),
    bodies={
        "where_is": (
            "Could you check where the {item} is now?",
            "I want to know where my package is.",
            "What does tracking say about my {item}?",
            "Where can I see the status of the {item}?",
            "Please tell me the location of my parcel.",
        ),
        "damaged": (
            "The {item} was broken when I took it out of the box.",
            "There are cracks in my {item}.",
            "The parcel was wet and the {item} is ruined.",
            "My {item} came with a dent.",
            "You delivered a smashed {item}.",
        ),
        "wrong_address": (
            "I made a mistake in the street name of my address.",
            "Please update the address for my {item}.",
            "The {item} has the wrong house number on it.",
            "I have moved, can you change where the {item} is delivered to my new address?",
            "The address I entered for the {item} is wrong.",
        ),
        "return": (
            "I wish to return this {item}.",
            "Can I send the {item} back and get a refund?",
            "The {item} is too big, how can I return it?",
            "I no longer want the {item}, how do I give it back?",
            "I need a return label for the {item}.",
        ),
        "late": (
            "The {item} was supposed to arrive five days ago.",
            "My {item} is delayed, it should be here already.",
            "I was told Thursday, and the {item} still has not come.",
            "The delivery is a week late.",
            "I have waited a month for the {item}.",
        ),
        "missing_item": (
            "There was no {item} in my parcel.",
            "I opened the box and one {item} was missing.",
            "The {item} I paid for was not in the package.",
            "You left the {item} out of the box.",
            "Only half of the things were in the box, the {item} is missing.",
        ),
    },
    details=(
        "The order number is {order}, for {city}.",
        "Order no. {order}, I live in {city}.",
        "I'm writing from {city} about order {order}.",
        "Number {order}, going to {city}.",
    ),
    urgent=("I need it very soon, it is urgent!", "Please answer today.", "Urgent!", "I really can't wait, please hurry up."),
    calm=("It is not in a hurry.", "No rush at all.", "There is time."),
    closings=("Thanks a lot.", "Kind regards", "Goodbye"),
    signatures=("Kind regards, {name}", "Thanks a lot, {name}", "Best, {name}"),
    names=_words("Adam,Alice,Boris,Camille,Daniel,Emma,Frank,Gina,Helen,Igor,Jonas,Kira,Lukas,Monica,Nora,Omar,Peter,Rita"),
    cities=_words(
        "Amsterdam,Austin,Barcelona,Basel,Bristol,Brussels,Copenhagen,Dresden,Florence,Glasgow,Houston,Lagos,Los Angeles,"
        "Marseille,Mumbai,Naples,Phoenix,Santiago,Stockholm,Valencia"
    ),
    items=("tent", "printer", "teapot", "guitar", "desk", "scarf", "radio"),
)
PHRASEBOOKS: dict[Split, Phrasebook] = {"train": TRAIN, "test": TEST}


def parcel_rows(split: Split, count: int, seed: int = 0) -> list[dict[str, JSON]]:
    """``count`` rows in the ``messages`` form; row i depends on nothing but (split, i, seed).

    The six intents take turns, so any first n rows are balanced. The system turn states the keys (and takes the place of
    the longer default one that some chat templates insert); the answer is one line of compact JSON.
    """
    return [_row(split, index, seed) for index in range(count)]


def _row(split: Split, index: int, seed: int) -> dict[str, JSON]:
    draw = random.Random(derive_seed(seed, f"parcel-{split}", index))
    book = PHRASEBOOKS[split]
    answer: dict[str, JSON] = {
        "intent": INTENTS[index % len(INTENTS)],
        "order": _order_number(draw, split),
        "name": draw.choice(book.names) if draw.random() < NAME_SHARE else None,
        "city": draw.choice(book.cities),
        "urgent": draw.random() < URGENT_SHARE,
    }
    text = _message(draw, book, answer)
    turns = (("system", INSTRUCTION), ("user", text), ("assistant", json.dumps(answer, separators=(",", ":"))))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _order_number(draw: random.Random, split: Split) -> str:
    """Like ``KX-4821``. The sum of the digits is even in train and odd in test: no number can be in both."""
    letters = "".join(draw.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=2))
    digits = draw.choices(range(10), k=3)
    parity = int(split == "test")
    last = draw.choice([d for d in range(10) if (sum(digits) + d) % 2 == parity])
    return f"{letters}-{''.join(map(str, [*digits, last]))}"


def _message(draw: random.Random, book: Phrasebook, answer: dict[str, JSON]) -> str:
    body = draw.choice(book.bodies[str(answer["intent"])]).format(item=draw.choice(book.items))
    middle = [_untidy(draw, body), _details(draw, book, answer)]
    draw.shuffle(middle)
    middle += _urgency(draw, book, bool(answer["urgent"]))
    opening, ending = _opening_and_ending(draw, book, answer["name"])
    return " ".join([*opening, *middle, *ending])


def _details(draw: random.Random, book: Phrasebook, answer: dict[str, JSON]) -> str:
    """Order and city; people leave out the dash, or put a # in front, and the answer has the tidy form."""
    order = str(answer["order"])
    written = draw.choice([order, order, "#" + order, order.replace("-", " ")])
    return draw.choice(book.details).format(order=written, city=answer["city"])


def _urgency(draw: random.Random, book: Phrasebook, urgent: bool) -> list[str]:
    if urgent:
        return [draw.choice(book.urgent)]
    return [draw.choice(book.calm)] if draw.random() < 0.25 else []


def _opening_and_ending(draw: random.Random, book: Phrasebook, name: JSON) -> tuple[list[str], list[str]]:
    """The name stands at the start, at the end, or nowhere; never twice."""
    greeting = [draw.choice(book.greetings)] if draw.random() < 0.7 else []
    closing = [draw.choice(book.closings)] if draw.random() < 0.5 else []
    if name is None:
        return greeting, closing
    if draw.random() < 0.5:
        return [*greeting, draw.choice(book.intros).format(name=name)], closing
    return greeting, [draw.choice(book.signatures).format(name=name)]


def _untidy(draw: random.Random, sentence: str) -> str:
    """As people type: now and then two letters swapped, everything small, or everything LARGE."""
    if draw.random() < TYPO_SHARE:
        sentence = _swap_two_letters(draw, sentence)
    if draw.random() < CASING_SHARE:
        sentence = draw.choice([sentence.lower(), sentence.lower().rstrip(".?!"), sentence.upper()])
    return sentence


def _swap_two_letters(draw: random.Random, sentence: str) -> str:
    inner = [i for i in range(1, len(sentence) - 2) if sentence[i - 1 : i + 2].isalpha()]
    place = draw.choice(inner)
    return sentence[:place] + sentence[place + 1] + sentence[place] + sentence[place + 2 :]
