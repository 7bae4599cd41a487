"""The phrases of the parcel task's customers: those that train messages are made of, and those of test messages.

Data only; ``parcel_task.py`` puts it together. No phrase, name, city or product stands on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasebook:
    """The phrases of one split. ``bodies`` maps an intent to its templates; ``{item}`` stands for a product."""

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
            "Please check where my {item} is today.",
            "Tell me the place where my {item} is now.",
            "Show me the tracking status of my {item}, please.",
            "What is the present location of the {item}?",
            "I would like to see where my package has got to.",
            "Where did my {item} get to?",
            "Where on the map is the {item}?",
            "Can I see the location of my package?",
            "What is the last scan of my {item}?",
            "Do you know the whereabouts of the {item}?",
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
            "There is a crack in the {item}.",
            "The {item} got wet in the parcel and is spoilt.",
            "The {item} was delivered with dents.",
            "You sent me a shattered {item}.",
            "When I took the {item} out, it was in two pieces.",
            "I found cracks and scratches on the {item}.",
            "The rain ruined my {item} in the box.",
            "The {item} you delivered is smashed.",
            "The corner of the {item} is broken off.",
            "My {item} got squashed on its way.",
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
            "There is a mistake in my address, it is the wrong street.",
            "Update my delivery address for the {item}, please.",
            "I have a new address, can the {item} be delivered there?",
            "The address for my {item} has an error.",
            "I moved house, please deliver the {item} to my new address.",
            "Please deliver the {item} to my new flat, not to the old one.",
            "Change where the {item} goes, I live somewhere else now.",
            "The house number for the {item} has to be corrected.",
            "I wrote a mistake into the address of the {item}.",
            "My address has changed since I ordered the {item}.",
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
            "I wish to give the {item} back.",
            "I need a label to return the {item}.",
            "Can I have a refund if I send the {item} back?",
            "The {item} is the wrong size, how can I return it?",
            "I no longer need the {item} and want to send it back.",
            "Is it possible to return this {item}?",
            "Where do I send the {item} for a refund?",
            "I have no use for the {item}, how do I return it?",
            "Please tell me how to give back the {item}.",
            "I want to hand the {item} back and get a refund.",
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
        "It is needed today.",
        "I need a reply today.",
        "Be quick, please.",
        "Very urgent!",
        "Urgent, please!",
        "It's urgent!",
        "This is really urgent!",
        "I need it soon, hurry!",
        "Urgent request!",
        "Please answer quickly.",
        "I am in a great hurry.",
        "It must be today, urgent!",
        "Hurry up, please!",
        "I really need it very soon.",
    ),
    calm=(
        "No hurry.",
        "There is no rush.",
        "Take your time.",
        "It is not urgent.",
        "Whenever you have time.",
        "It can wait.",
        "I have time.",
        "I am in no hurry.",
        "No rush.",
        "There is time.",
        "Please take all the time you need.",
        "No need to hurry at all.",
    ),
    closings=("Thanks!", "Thank you.", "Best regards", "Please help.", "Bye", "Many thanks"),
    signatures=("Thanks, {name}", "Thank you, {name}", "Best regards, {name}", "- {name}", "Bye, {name}", "Yours, {name}"),
    names=_words(
        "Abel,Ada,Agnes,Aisha,Alan,Albert,Alma,Amir,Andre,Angela,Anna,Arthur,Bea,Ben,Bianca,Brian,Bruno,Carla,Carmen,Chen,"
        "Clara,Cora,Dan,Dario,David,Derek,Diana,Dina,Edith,Elena,Eli,Ella,Emil,Enzo,Erik,Esther,Eva,Evan,Farid,Felix,Finn,"
        "Fiona,Flora,Gabriel,George,Gloria,Grace,Greta,Hana,Hannah,Harold,Hector,Heidi,Henry,Hugo,Ida,Ines,Ingrid,Irene,"
        "Isaac,Ivan,Jack,Jakob,James,Jana,Jane,Joel,John,Judith,Julia,Kai,Karim,Karl,Kate,Kevin,Laura,Layla,Lena,Leo,Lina,"
        "Lisa,Louis,Luca,Lucy,Luis,Maria,Marta,Martin,Mary,Max,Maya,Mei,Miguel,Mila,Mohamed,Molly,Nadia,Nathan,Nick,Nils,"
        "Nina,Noah,Olga,Olivia,Oscar,Otto,Pablo,Paul,Paula,Pedro,Petra,Philip,Priya,Rachel,Ralph,Raul,Rebecca,Robert,Robin,"
        "Rosa,Ruth,Ryan,Sam,Samir,Sandra,Sara,Sean,Silvia,Simon,Sofia,Stefan,Sven,Tara,Tariq,Teresa,Theo,Thomas,Tina,Tom,"
        "Uma,Ursula,Vera,Victor,Viola,Walter,Wanda,Xavier,Yara,Yuki,Yusuf,Zoe"
    ),
    cities=_words(
        "Aachen,Aberdeen,Accra,Adelaide,Algiers,Ankara,Antwerp,Athens,Atlanta,Auckland,Baltimore,Bangkok,Belfast,Belgrade,"
        "Bergen,Berlin,Bilbao,Birmingham,Bologna,Bonn,Bordeaux,Boston,Bremen,Brighton,Brno,Budapest,Buenos Aires,Cairo,"
        "Calgary,Cambridge,Cape Town,Cardiff,Casablanca,Chicago,Cleveland,Cologne,Cork,Coventry,Dakar,Dallas,Delhi,Denver,"
        "Detroit,Dublin,Dundee,Durban,Edinburgh,Essen,Exeter,Frankfurt,Geneva,Genoa,Ghent,Gothenburg,Granada,Graz,Grenoble,"
        "Hamburg,Hanoi,Hanover,Havana,Helsinki,Innsbruck,Istanbul,Jakarta,Karachi,Kiel,Krakow,Kyoto,Leeds,Leipzig,Lille,"
        "Lima,Linz,Lisbon,Liverpool,London,Lucerne,Lyon,Madrid,Malaga,Malmo,Manchester,Manila,Melbourne,Memphis,Miami,"
        "Milan,Minsk,Montreal,Munich,Nairobi,Nantes,New York,Newcastle,Norwich,Odense,Orlando,Osaka,Oslo,Ottawa,Oxford,"
        "Palermo,Paris,Perth,Pittsburgh,Portland,Porto,Prague,Pune,Quito,Reykjavik,Riga,Rome,Rotterdam,Salzburg,San Diego,"
        "San Jose,Seattle,Seoul,Seville,Sheffield,Stuttgart,Sydney,Tampere,Tokyo,Toronto,Toulouse,Trieste,Tunis,Turin,"
        "Uppsala,Utrecht,Vancouver,Venice,Verona,Vienna,Vilnius,Warsaw,Winnipeg,Wroclaw,York,Zagreb,Zurich"
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
            "I have moved, please deliver the {item} to my new home.",
            "The address I entered for the {item} is wrong.",
        ),
        "return": (
            "I wish to return this {item}.",
            "Can I send the {item} back and get a refund?",
            "The {item} is too big, how can I return it?",
            "I no longer want the {item}, how do I give it back?",
            "I need a return label for the {item}.",
        ),
    },
    details=(
        "The order number is {order}, for {city}.",
        "Order no. {order}, I live in {city}.",
        "I'm writing from {city} about order {order}.",
        "Number {order}, going to {city}.",
    ),
    urgent=("I need it very soon, it is urgent!", "Please answer today.", "Urgent!", "I really can't wait, please hurry up."),
    calm=("I am not in a hurry.", "No rush at all.", "There is plenty of time."),
    closings=("Thanks a lot.", "Kind regards", "Goodbye"),
    signatures=("Kind regards, {name}", "Thanks a lot, {name}", "Best, {name}"),
    names=_words("Adam,Alice,Boris,Camille,Daniel,Emma,Frank,Gina,Helen,Igor,Jonas,Kira,Lukas,Monica,Nora,Omar,Peter,Rita"),
    cities=_words(
        "Amsterdam,Austin,Barcelona,Basel,Bristol,Brussels,Copenhagen,Dresden,Florence,Glasgow,Houston,Lagos,Los Angeles,"
        "Marseille,Mumbai,Naples,Phoenix,Santiago,Stockholm,Valencia"
    ),
    items=("tent", "printer", "teapot", "guitar", "desk", "scarf", "radio"),
)
