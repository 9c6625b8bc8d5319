"""Words that the recall and tool-call tasks are made of; fixed, so that figures can be compared."""

ADJECTIVES = (
    "red blue green yellow white black grey pink brown purple silver golden small large tall short "
    "long round flat deep quick slow quiet loud bright dark light heavy warm cold dry wet soft hard "
    "sharp smooth rough clean dusty fresh old new young early late first last happy sad brave calm "
    "kind proud wise lucky hungry sleepy lonely busy lazy gentle fierce clever strange plain"
).split()
NOUNS = (
    "fox wolf bear deer hare mouse horse goat sheep cow pig dog cat duck goose swan owl hawk eagle "
    "crow robin frog toad snake turtle fish shark whale crab ant bee moth spider tree oak pine rose "
    "lily fern river lake hill valley bridge tower castle garden house barn door window table chair "
    "lamp clock bell drum ship boat train wagon coin stone key book"
).split()
VALUES = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu apple pear plum peach "
    "cherry grape lemon lime melon mango fig olive carrot potato onion garlic pepper bean corn rice "
    "wheat barley bread butter cheese honey sugar salt tea coffee milk water iron copper tin lead "
    "zinc gold nickel cobalt quartz amber ruby pearl jade opal coral ivory silk cotton wool linen "
    "velvet paper glass brick clay sand snow rain wind cloud storm thunder sun moon star mars venus "
    "saturn jupiter neptune violin piano flute harp trumpet guitar dance poem story song north south "
    "east west spring summer autumn winter monday friday sunday"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki "
    "Athens Budapest Brussels Zurich Geneva Milan Naples Munich Hamburg Lyon Porto Seville Krakow "
    "Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Manila Jakarta Sydney "
    "Melbourne Auckland Cairo Nairobi Lagos Accra Tunis Boston Chicago Denver Seattle Dallas Austin "
    "Toronto Montreal Vancouver Lima Quito Bogota Santiago Havana"
).split()
PEOPLE = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oliver Paul Quinn "
    "Rosa Sam Tina Victor Wendy Xavier Yara Zoe Anna Ben Clara Daniel Eva Felix Greta Hugo Ida Jonas "
    "Kate Lucas Mona Noah Olga Peter Ruth Simon Tom"
).split()
