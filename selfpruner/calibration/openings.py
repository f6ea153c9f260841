"""How documents begin: the openings from which the dense model writes its calibration text.

An opening is a frame of some kind of page (encyclopedia, news, forum, shop, recipe, fiction, code, ...) filled with a subject.
Kinds are weighted roughly as they occur on the web. One document in eight has no opening at all.
"""

from __future__ import annotations

import random

SUBJECTS: dict[str, tuple[str, ...]] = {
    "person": (
        "Margaret Hollis", "Daniel Okafor", "Ana Ruiz", "Henry Whitcombe", "Li Wei", "Sofia Lindqvist", "James T. Barlow",
        "Priya Nair", "Thomas Eckhart", "Amara Diallo", "Robert Kinsey", "Elena Petrova", "George Fairchild", "Yuki Tanaka",
        "Samuel Ortega", "Clara Beaumont", "William Ashford", "Fatima Rahman", "Peter Novak", "Ruth Abernathy",
    ),
    "place": (
        "Ohio", "Lisbon", "northern Scotland", "the Mekong Delta", "Kansas City", "Nairobi", "Tasmania", "the Black Forest",
        "Buenos Aires", "New Brunswick", "the Yorkshire coast", "Texas", "Osaka", "the Atlas Mountains", "Wisconsin",
        "Kraków",
        "southern California", "Mumbai", "the Isle of Wight", "Vancouver", "Georgia", "Istanbul", "Alaska", "Brittany",
    ),
    "thing": (
        "stainless steel kettle", "cordless drill", "leather backpack", "LED desk lamp", "cotton bed sheet", "running shoe",
        "wooden picture frame", "wireless keyboard", "garden hose", "camping tent", "coffee grinder", "silver necklace",
        "office chair", "phone case", "kitchen knife", "winter jacket", "water filter", "mountain bike", "wall clock",
        "face cream",
    ),
    "topic": (
        "the water cycle", "small business loans", "online learning", "back pain", "solar panels", "the Roman army",
        "home insurance",
        "wedding photography", "organic farming", "artificial intelligence", "the stock market", "raising twins",
        "climate change",
        "dental care", "search engines", "the French Revolution", "healthy sleep", "used cars", "immigration law",
        "jazz guitar",
        "cyber security", "early childhood education", "marathon training", "the housing market", "black holes",
        "public transport",
        "wine tasting", "diabetes", "project management", "medieval castles", "yoga", "the Cold War", "dog training",
        "web design",
        "renewable energy", "the immune system", "urban planning", "volcanoes", "personal finance", "the printing press",
    ),
    "animal": (
        "moth", "freshwater fish", "songbird", "beetle", "orchid", "land snail", "frog", "bat", "oak", "sea cucumber",
        "lizard", "fern",
    ),
    "team": (
        "Rovers", "Eagles", "United", "Tigers", "Hawks", "City", "Wanderers", "Bulldogs", "Royals", "Dynamo",
        "Panthers", "Athletic",
    ),
    "dish": (
        "chicken soup", "banana bread", "lentil curry", "roast potatoes", "apple pie", "fish tacos", "mushroom risotto",
        "chocolate cookies", "beef stew", "Greek salad", "pancakes", "vegetable lasagna",
    ),
    "name": ("Emma", "Jack", "Mrs. Alder", "Tobias", "the old man", "Captain Reyes", "Nora", "my brother", "Isabel",
    "the doctor"),
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "code": (
        "parse_config", "UserSession", "download_file", "matrix multiplication", "a linked list", "HTTP requests",
        "read_csv", "the cache",
    ),
}  # fmt: skip

# (weight, frames). {year} and {n} are numbers; the other fields are keys of SUBJECTS.
KINDS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (  # encyclopedia
        7,
        (
            "{person} (born {n} {month} {year}) is", "{person} (died {month} {year}) was", "= {person} =\n\n{person} was",
            "The {year} {place} {team} season was", "The history of {topic}", "The Battle of {place} was fought",
            "{place} is a",
            "A species of {animal}, it is found in {place}", "The {animal} is", "In {year}, the population of {place}",
            "The song was released in {month} {year}", "The ship was laid down in {year}",
            "{person} made his debut for {team}",
            "The episode was written by {person} and first aired on {month} {n}, {year}.", "The album received",
            "In {place}, {topic}", "The film stars {person} and {person}", "Construction of the church began in {year}",
            "Route {n} is a state highway in {place}",
        ),
    ),
    (  # news
        4,
        (
            "{place} — Officials said on {month} {n}", "({month} {n}, {year}) A new report on {topic}",
            "Police in {place} are",
            "{team} beat {team} {n}-1 on Saturday", "The governor announced", "Shares of the company fell",
            "By {person}\n\n",
            "{person}, a spokesman for the department, said", "Residents of {place} were",
            "According to a study published in {month},",
            "The school board voted",
        ),
    ),
    (  # company and shop pages
        5,
        (
            "Welcome to", "Our {thing} is", "This {thing} features", "At our company in {place}, we",
            "We are looking for a",
            "Buy the best {thing}", "Product description\n\nThe {thing}", "Are you looking for {topic}?",
            "About us\n\nFounded in {year},",
            "Free shipping on", "Contact us today", "Our team has over {n} years of experience",
            "{n} bed house for sale in {place}",
            "Book your stay at", "Join us on {month} {n} for", "Tickets are",
        ),
    ),
    (  # blogs, reviews, advice
        6,
        (
            "I have been", "Last week I", "{n} Tips for {topic}\n\n", "Why {topic} matters",
            "When it comes to {topic},", "How to",
            "I bought this {thing}", "Posted on {month} {n}, {year} by {person}\n\n", "I love this",
            "If you are thinking about {topic},",
            "We spent {n} days in {place}", "It's been a while since", "Review: ", "Many people believe that",
            "One of the best things about",
            "My husband and I", "There is nothing better than {dish}", "So you want to", "As a parent,", "This book",
        ),
    ),
    (  # forums, questions and answers
        3,
        (
            "Q: How do I", "Hi everyone,\n\nI have a question about {topic}.", "Re: {topic}\n\n", "Does anyone know",
            "Thanks for the reply.",
            "I'm having a problem with my {thing}.", "What is the difference between", "Originally posted by {name}:",
            "Just wondering if",
        ),
    ),
    (  # science and teaching
        4,
        (
            "Abstract\n\nBackground:", "In this paper, we", "{topic} is one of", "Scientists have discovered",
            "Chapter {n}\n\n",
            "The effect of", "In mathematics,", "The results show that", "Lesson {n}: {topic}\n\n", "The human body",
            "Students will",
            "The theory of", "Cells are", "During the {n}th century,", "Figure {n}.",
        ),
    ),
    (  # fiction, memoir, poetry
        3,
        (
            "{name} looked", "\"I don't know,\" said {name}.", "It was a", "Chapter {n}\n\n{name} had", "The rain",
            "When I was {n},",
            "\"Where are you going?\"", "Once upon a time", "{name} opened the door and", "The letter began:",
        ),
    ),
    (1, ("{dish}\n\nIngredients:\n", "This {dish} is", "Preheat the oven to", "For the {dish}, start by")),
    (  # law, government, religion, finance
        2,
        (
            "Section {n}.", "The court held that", "Under the terms of", "The Department of", "Notice is hereby given",
            "The committee",
            "In the Bible,", "For the quarter ended {month} {n}, {year},", "This Agreement", "The President",
            "The city council of {place}",
        ),
    ),
    (  # code and its documentation
        1,
        (
            "# {code}\n\n", "This function returns", "def ", "To install the package,", "import ",
            "The following example shows {code}",
            "Release notes\n\nVersion {n}.0",
        ),
    ),
    (5, ("",)),
)  # fmt: skip


def opening(chance: random.Random) -> str:
    """Draw the first words of a document; empty when the model may begin as it likes."""
    frames = chance.choices([frames for _, frames in KINDS], [weight for weight, _ in KINDS])[0]
    text = chance.choice(frames)
    for key, subjects in SUBJECTS.items():
        while f"{{{key}}}" in text:
            text = text.replace(f"{{{key}}}", chance.choice(subjects), 1)
    text = text.replace("{year}", str(chance.randint(1840, 2023))).replace("{n}", str(chance.randint(2, 30)))
    # Byte-level tokenizers write a word with the space before it: a space at the end would force an unusual continuation.
    return text[:1].upper() + text[1:].rstrip(" ")
