"""Lays out the pages behind IVT-Screens-v0: applications written here, and documentation that may be shipped.

    python -m sphinx -q docs build/docs
    apt-get install sqlite3-doc chromium chromium-driver
    python -m experiments.screen_pages --out build/pages
    ivt data render-screens build/pages --out build/screens --name web-pages

The applications are made up: 16 kinds, each twice, with other words, colours and sizes.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

SQLITE = (
    "lang", "pragma", "c3ref/funclist", "lang_corefunc", "lang_datefunc", "json1", "datatype3", "compile", "limits",
    "faq", "windowfunctions", "chronology", "fts5", "cli", "keyword_index", "c3ref/constlist",
)  # fmt: skip
DOCS = ("index", "environments", "metrics", "command_line", "data/README", "own_agent", "results", "pitfalls", "map")

PEOPLE = (
    "Amara Diallo", "Bogdan Ilic", "Chen Wei", "Dana Levy", "Elif Kaya", "Farid Nazari", "Greta Holm", "Hugo Castro",
    "Ines Moreau", "Jonas Berg", "Kavya Rao", "Liam Byrne", "Mina Park", "Noor Haddad", "Olga Petrova", "Pablo Ruiz",
    "Quinn Foster", "Rosa Bianchi", "Sven Lund", "Tariq Aziz", "Uma Nair", "Viktor Novak", "Wanda Kowalska",
    "Xenia Popa", "Yusuf Demir", "Zoe Martin", "Anton Weiss", "Bela Szabo", "Clara Jensen", "Dmitri Orlov",
)  # fmt: skip
THINGS = (
    "Walnut desk", "Oak shelf", "Desk lamp", "Office chair", "Filing cabinet", "Whiteboard", "Standing mat",
    "Monitor arm", "Cable tray", "Paper tray", "Corner sofa", "Coffee table", "Floor lamp", "Wool rug", "Bar stool",
    "Coat rack", "Wall clock", "Plant pot", "Book end", "Foot rest", "Phone booth", "Room divider", "Notice board",
    "Side table", "Pencil case", "Desk fan", "Power strip", "Door stop", "Key cabinet", "Waste bin",
)  # fmt: skip
SUBJECTS = (
    "Quarterly report", "Lunch on Friday", "Invoice 2041", "Flight to Oslo", "New badge photo", "Server move",
    "Minutes of the board", "Your parcel", "Survey results", "Draft contract", "Fire drill", "Parking permit",
    "Budget question", "Welcome pack", "Password expiry", "Team photo", "Printer toner", "Travel claim", "Release notes",
    "Price list", "Room booking", "Holiday plan", "Test protocol", "Spare keys", "Annual review", "Menu for Monday",
    "Broken link", "Access request", "Canteen hours", "Visitor list",
)  # fmt: skip
FILES = (
    "report.odt", "budget.ods", "photo-014.jpg", "notes.txt", "slides.odp", "backup.tar", "plan.pdf", "logo.svg",
    "contract.pdf", "music.flac", "scan-002.tif", "index.html", "readme.md", "data.csv", "model.stl", "map.png",
    "letter.odt", "recipe.txt", "archive.zip", "mail.mbox", "sketch.svg", "talk.webm", "thesis.tex", "todo.txt",
)  # fmt: skip
TASKS = (
    "Fix the login page", "Rename the export", "Crash on empty file", "Faster search", "Dark theme", "Translate help",
    "Update licences", "Wrong time zone", "Add unit tests", "Drop old driver", "Larger fonts", "Undo after save",
    "Print preview", "Sort by size", "Remember window", "Check spelling", "Import contacts", "Keyboard shortcuts",
    "Broken thumbnail", "Slow start", "Missing icon", "Wrong currency", "Merge duplicates", "Offline mode",
)  # fmt: skip
CITIES = ("Oslo", "Turin", "Lyon", "Gdansk", "Porto", "Ghent", "Malmo", "Brno", "Graz", "Split", "Cork", "Bergen")

THEMES = (
    ("#ffffff", "#1d2430", "#eef1f5", "#1f5fbf", "13px", "Liberation Sans"),
    ("#1e2227", "#dfe4ea", "#2a3038", "#7db4ff", "12px", "DejaVu Sans"),
    ("#fbf8f1", "#33291c", "#efe8d8", "#8a4b08", "14px", "Liberation Serif"),
    ("#f4fbf7", "#12332a", "#dff1e8", "#0b6b4f", "12px", "Liberation Sans"),
)
"""Ground, text, panel, accent, size and typeface."""

Draw = random.Random


def page(title: str, body: str, theme: int) -> str:
    """A whole page; ``body`` is what an application shows."""
    ground, text, panel, accent, size, face = THEMES[theme % len(THEMES)]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>
* {{ box-sizing: border-box }}
body {{ margin: 0; font: {size}/1.45 "{face}", sans-serif; background: {ground}; color: {text};
       display: flex; flex-direction: column; height: 100vh; overflow: hidden }}
header, footer {{ background: {panel}; padding: 6px 12px; display: flex; gap: 14px; align-items: center }}
main {{ display: flex; flex: 1; min-height: 0 }} nav, aside {{ background: {panel}; padding: 12px; width: 210px }}
aside {{ width: 330px }} nav a {{ display: table; margin: 3px 0 }} section {{ flex: 1; padding: 12px 20px; min-width: 0 }}
a {{ color: {accent}; text-decoration: none }} table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: 3px 8px; border-bottom: 1px solid {panel}; font-weight: normal }}
thead th {{ font-weight: bold; background: {panel} }}
button {{ font: inherit; color: {text}; background: {panel}; border: 1px solid {accent}; border-radius: 3px }}
button.icon {{ border: 0; padding: 0 3px; color: {accent}; font-family: "DejaVu Sans" }}
input, select, textarea {{ font: inherit; color: {text}; background: {ground}; border: 1px solid #8888 }}
h1 {{ font-size: 1.5em; margin: 4px 0 }} h2 {{ font-size: 1.1em; margin: 8px 0 4px }} p {{ margin: 4px 0 }}
.grid {{ display: grid; gap: 14px 22px; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }}
.card {{ border: 1px solid #8885; padding: 8px; border-radius: 4px }} label {{ display: flex; gap: 6px; margin: 4px 0 }}
label.above {{ flex-direction: column; gap: 1px }} [role=tab] {{ padding: 2px 10px }}
dialog {{ background: {ground}; color: {text}; border: 1px solid {accent}; width: 520px }}
</style><body>{body}</body></html>"""


def links(names: Sequence[str]) -> str:
    return " ".join(f'<a href="#{n}">{escape(name)}</a>' for n, name in enumerate(names))


def buttons(names: Sequence[str], role: str = "button") -> str:
    return " ".join(f'<button role="{role}">{escape(name)}</button>' for name in names)


def icons(named: dict[str, str]) -> str:
    """Buttons with a sign on them, and a name that only a reader of the page's code sees."""
    return " ".join(f'<button class="icon" aria-label="{name}">{sign}</button>' for name, sign in named.items())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], named: int = 0) -> str:
    """A table of HTML cells; column ``named`` names the row."""
    lines = "".join(
        "<tr>"
        + "".join(f'<th scope="row">{c}</th>' if n == named else f"<td>{c}</td>" for n, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead><tbody>{lines}</tbody></table>"


def field(label: str, value: str = "", kind: str = "text") -> str:
    """An input with its label above it."""
    return f'<label class="above">{label} <input type="{kind}" value="{escape(value)}"></label>'


def choice(label: str, values: Sequence[str]) -> str:
    """A list with its label above it."""
    return (
        f'<label class="above">{label} <select aria-label="{label}">'
        + "".join(f"<option>{value}</option>" for value in values)
        + "</select></label>"
    )


def box(label: str, kind: str = "checkbox", on: bool = False) -> str:
    """A checkbox or a radio button in front of its label."""
    return f'<label><input type="{kind}"{" checked" * on}> {label}</label>'


def search(hint: str) -> str:
    return f'<input type="search" placeholder="{hint}" size="30">'


def day(draw: Draw) -> str:
    month = draw.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
    return f"{draw.randint(1, 28)} {month} {draw.randint(7, 19)}:{draw.randint(10, 59)}"


def mail(draw: Draw) -> str:
    rows = [
        ['<input type="checkbox" aria-label="Select">', icons({"Star": "☆", "Flag": "⚑"}), f'<a href="#m">{subject}</a>',
         sender, f"{draw.randint(2, 980)} kB", day(draw)]
        for subject, sender in zip(draw.sample(SUBJECTS, 30), draw.sample(PEOPLE, 30), strict=True)
    ]  # fmt: skip
    folders = draw.sample(("Inbox", "Drafts", "Sent", "Archive", "Spam", "Trash", "Templates", "Outbox"), 8)
    tools = {"Compose": "✎", "Refresh": "⟳", "Print": "⎙", "Settings": "⚙", "Undo": "↶"}
    return (
        f"<header>{icons(tools)}{buttons(('Reply', 'Reply all', 'Forward', 'Move', 'Mark as read'))}{search('Search mail')}"
        f"</header><main><nav><h2>Folders</h2>{links(folders)}<h2>Labels</h2>{links(draw.sample(CITIES, 7))}</nav><section>"
        f"{table(('', '', 'Subject', 'From', 'Size', 'Received'), rows, 2)}</section><aside><h2>{rows[3][3]}</h2>"
        f"<p>The figures are attached. Please send remarks by {day(draw)}.</p>{links(draw.sample(FILES, 5))}</aside></main>"
    )


def sheet(draw: Draw) -> str:
    head = ("Item", "Order", "Stock", "Price", "Weight", "Supplier", "Depot", "Counted", "Margin", "Shelf")
    rows = [
        [item, f"PO-{draw.randint(1000, 9999)}", str(draw.randint(0, 400)), f"{draw.uniform(3, 900):.2f}",
         f"{draw.uniform(0.1, 60):.1f} kg", draw.choice(PEOPLE), draw.choice(CITIES), day(draw),
         f"{draw.randint(5, 60)} %", f"{draw.choice('ABCDE')}{draw.randint(10, 99)}"]
        for item in draw.sample(THINGS, 30)
    ]  # fmt: skip
    menu = buttons(("File", "Edit", "View", "Insert", "Format", "Data", "Tools", "Help"), "menuitem")
    tools = {"Bold": "𝐁", "Align left": "⇤", "Align right": "⇥", "Sum": "∑", "Chart": "▤", "Filter": "▽", "Undo": "↶",
             "Redo": "↷", "Cut": "✂", "Freeze": "❄"}  # fmt: skip
    return (
        f'<header role="menubar">{menu}</header><header>{icons(tools)}{choice("Font size", ("10", "11", "12"))}'
        f"{search('Find in sheet')}</header><main><section>{table(head, rows)}</section></main>"
        f'<footer role="tablist">{buttons(("Stock", "Orders", "Returns", "Totals 2025", "Scratch"), "tab")}</footer>'
    )


def settings(draw: Draw) -> str:
    groups = draw.sample(("Display", "Sound", "Network", "Privacy", "Updates", "Keyboard", "Backup", "Storage"), 6)
    lines = ("Enabled", "Start with the system", "Show in the menu", "Send reports", "Use less power", "Ask first")
    cards = "".join(
        f'<div class="card"><h2>{group}</h2>'
        + "".join(f'<label><button role="switch" aria-checked="true" aria-label="{line}">◉</button> '
                  f"<span>{line}</span></label>" for line in draw.sample(lines, 4))
        + choice("Profile", ("Default", "Travel", "Office"))
        + field("Limit", str(draw.randint(5, 500)), "number")
        + "".join(box(each, "radio") for each in draw.sample(("Always", "Never", "On battery", "At night"), 3))
        + buttons(("Reset", "Apply")) + "</div>"
        for group in groups
    )  # fmt: skip
    about = ("General", "Accounts", "Appearance", "Language", "Shortcuts", "Extensions", "Licences", "About")
    return (
        f"<header><h1>Settings</h1>{search('Search settings')}{buttons(('Import', 'Export', 'Restore defaults'))}</header>"
        f'<main><nav>{links(about)}</nav><section><div class="grid">{cards}</div></section></main>'
    )


def calendar(draw: Draw) -> str:
    events = [f"{draw.randint(8, 18)}:{draw.choice(('00', '15', '30'))} {s}" for s in SUBJECTS + TASKS]
    draw.shuffle(events)
    weeks, taken = [], iter(events)
    for week in range(5):
        cells = [f"Week {draw.randint(1, 9) * 5 + week}"]
        for _ in range(7):
            entries = "".join(
                f'<div><a href="#e">{next(taken, "")}</a></div>' for _ in range(draw.choice((0, 1, 1, 2, 3)))
            )
            cells.append(f'<div style="height: 150px">{entries}</div>')
        weeks.append(cells)
    return (
        f"<header>{icons({'Previous month': '◀', 'Next month': '▶', 'New event': '✚', 'Print': '⎙'})}<h1>October</h1>"
        f"{buttons(('Today', 'Day', 'Week', 'Month', 'Year', 'Agenda'))}{search('Find an event')}</header><main><nav>"
        f"<h2>Calendars</h2>{''.join(map(box, draw.sample(CITIES, 6)))}<h2>People</h2>"
        f"{''.join(map(box, draw.sample(PEOPLE, 9)))}</nav><section>"
        f"{table(('', 'Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun'), weeks)}</section></main>"
    )


def files(draw: Draw) -> str:
    tools = {"Rename": "✎", "Share": "➦", "Delete": "✖", "Details": "ⓘ"}
    rows = [
        ['<input type="checkbox" aria-label="Select">', f'<a href="#f">{name}</a>', f"{draw.randint(1, 900)} kB",
         draw.choice(("Document", "Image", "Archive", "Text")), draw.choice(PEOPLE), day(draw), icons(tools)]
        for name in draw.sample(FILES, 24)
    ]  # fmt: skip
    places = ("Home", "Desktop", "Documents", "Downloads", "Music", "Pictures", "Videos", "Network", "Bin")
    return (
        f"<header>{icons({'Back': '◀', 'Forward': '▶', 'Up': '▲', 'Reload': '⟳', 'List view': '☰', 'Grid view': '▦'})}"
        f"{links(('/', 'home', *draw.sample(CITIES, 2)))}{search('Search this folder')}</header><main><nav><h2>Places</h2>"
        f"{links(places)}<h2>Tags</h2>{links(('Red', 'Green', 'Blue', 'Work', 'Private'))}</nav><section>"
        f"{table(('', 'Name', 'Size', 'Type', 'Owner', 'Changed', 'Actions'), rows, 1)}</section></main>"
        f"<footer>{buttons(('New folder', 'Upload', 'Select all', 'Sort'))} 24 items, 9.4 MB free</footer>"
    )


def users(draw: Draw) -> str:
    rows = [
        [f"{draw.randint(100, 999)}", person, f"{person.split()[0].lower()}@example.org", draw.choice(CITIES),
         draw.choice(("Owner", "Editor", "Reader")), day(draw), draw.choice(("Active", "Invited", "Locked")),
         buttons(("Edit", "Reset", "Delete"))]
        for person in draw.sample(PEOPLE, 26)
    ]  # fmt: skip
    return (
        f"<header><h1>Users</h1>{search('Name or address')}{buttons(('Invite user', 'Export as CSV', 'Filter'))}</header>"
        f"<main><nav>{links(('Overview', 'Users', 'Groups', 'Roles', 'Sign-ins', 'Audit log', 'Billing', 'Domains'))}</nav>"
        f"<section>{table(('No.', 'Name', 'Address', 'Site', 'Role', 'Last seen', 'State', ''), rows, 1)}"
        f"<p>{links(('First', '2', '3', '4', '5', 'Last page'))}</p></section></main>"
    )


def form(draw: Draw) -> str:
    place = ("Name", "Street", "Town", "Postcode", "Country", "Telephone")
    parts = "".join(
        f'<div class="card"><h2>{part}</h2>'
        + "".join(field(label, draw.choice(PEOPLE) if label == "Name" else "") for label in place)
        + box("Use as default") + buttons(("Clear", "Copy")) + "</div>"
        for part in ("Billing address", "Delivery address", "Return address", "Contact at night")
    )  # fmt: skip
    extra = "".join(box(each, "radio") for each in ("Standard, 3 days", "Express, 1 day", "Collect in person"))
    terms = "".join(map(box, ("Gift wrapping", "Send the invoice by mail", "I accept the terms", "Newsletter")))
    return (
        f"<header><h1>Order {draw.randint(1000, 9999)}</h1>{links(('Basket', 'Account', 'Help', 'Sign out'))}</header><main>"
        f'<section><div class="grid">{parts}</div><div class="grid"><div class="card"><h2>Delivery</h2>{extra}</div>'
        f'<div class="card"><h2>Options</h2>{terms}{field("Voucher")}</div><div class="card"><h2>Payment</h2>'
        f"{choice('Method', ('Card', 'Transfer', 'On delivery'))}{field('Card number')}{field('Valid until', '', 'date')}"
        f"</div></div><p>{buttons(('Place the order', 'Save for later', 'Cancel'))}</p></section></main>"
    )


def dialog(draw: Draw) -> str:
    inner = (
        f"<h2>Export {draw.choice(FILES)}</h2>{field('File name', 'export')}{choice('Format', ('CSV', 'JSON', 'PDF'))}"
        f"{choice('Encoding', ('UTF-8', 'Latin-1'))}{field('First page', '1', 'number')}{field('Last page', '9', 'number')}"
        + "".join(
            map(box, draw.sample(("With header", "Compress", "Open when done", "Only selected", "Embed fonts"), 4))
        )
        + "".join(box(each, "radio") for each in ("Portrait", "Landscape"))
        + f"<p>{buttons(('Export', 'Preview', 'Cancel', 'More options'))} {links(('Help on exporting',))}"
        + f"{icons({'Close': '✖'})}</p>"
    )
    behind = draw.choice((users, files, sheet))(draw)
    return f"{behind}<dialog>{inner}</dialog><script>document.querySelector('dialog').showModal()</script>"


def board(draw: Draw) -> str:
    tasks = iter(draw.sample(TASKS, 24))
    columns = "".join(
        f'<div class="card"><h2>{name}</h2>'
        + "".join(
            f'<div class="card"><a href="#t">{next(tasks)}</a><p>{draw.choice(PEOPLE)}, {day(draw)}</p>'
            f"{icons({'Move': '➦', 'Comment': '✎', 'Archive': '▣'})}</div>" for _ in range(draw.randint(3, 5)))
        + buttons(("Add card", "Sort")) + "</div>"
        for name in draw.sample(("Ideas", "Next", "Doing", "Review", "Blocked", "Done", "Later"), 5)
    )  # fmt: skip
    return (
        f"<header><h1>Board</h1>{buttons(('Filter', 'Group', 'Automate', 'Share'))}{search('Find a card')}"
        f'{links(draw.sample(PEOPLE, 5))}</header><main><section><div class="grid">{columns}</div></section></main>'
    )


def shop(draw: Draw) -> str:
    goods = "".join(
        f'<div class="card"><h2>{thing}</h2><p>{draw.uniform(5, 900):.2f} euros, {draw.randint(1, 400)} reviews</p>'
        f"{links(('Details', 'Reviews'))} {buttons(('Add to basket',))} {icons({'Remember': '♡', 'Compare': '⚖'})}</div>"
        for thing in draw.sample(THINGS, 28)
    )
    filters = "".join(map(box, ("In stock", "On sale", "New", "Second hand", "Free delivery", *draw.sample(CITIES, 6))))
    return (
        f"<header><h1>Furniture</h1>{search('Search the shop')}{links(('Basket', 'Orders', 'Sign in', 'Wish list'))}"
        f"{choice('Sort by', ('Price', 'Name', 'Rating'))}</header><main><nav><h2>Filters</h2>{filters}"
        f"{field('Lowest price')}{field('Highest price')}{buttons(('Apply', 'Clear'))}</nav>"
        f'<section><div class="grid">{goods}</div></section></main>'
    )


def dashboard(draw: Draw) -> str:
    figures = "".join(
        f'<div class="card"><h2>{name}</h2><h1>{draw.randint(10, 99999):,}</h1><p>{draw.randint(-9, 30)} % on last week</p>'
        f"{links(('Details', 'Trend'))} {icons({'Pin': '⚑', 'Hide': '✖'})}</div>"
        for name in ("Visits", "Orders", "Returns", "Revenue", "Open tickets", "Errors", "Sign-ups", "Refunds")
    )
    rows = [
        [city, *(f"{draw.randint(1, 9999):,}" for _ in range(7)), f"{draw.uniform(0, 9):.2f} %"]
        for city in draw.sample(CITIES, 12)
    ]
    head = ("Site", "Visits", "Orders", "Returns", "Baskets", "Searches", "Reviews", "Calls", "Rate")
    return (
        f"<header><h1>Overview</h1>{buttons(('Last day', 'Last week', 'Last month', 'Compare'))}{search('Find a figure')}"
        f"{links(('Alerts', 'Reports', 'Team', 'Profile'))}</header><main><nav>{links(draw.sample(THINGS, 12))}</nav><section>"
        f'<div class="grid">{figures}</div><h2>By site</h2>{table(head, rows)}</section></main>'
    )


def issues(draw: Draw) -> str:
    labels = ("bug", "docs", "question", "wish", "urgent", "easy")
    rows = [
        [f"#{draw.randint(100, 999)}", f'<a href="#i">{task}</a>', links([draw.choice(labels)]),
         f'<a href="#p">{draw.choice(PEOPLE)}</a>', str(draw.randint(0, 40)), day(draw),
         icons({"Watch": "◉", "Close issue": "✓", "Pin": "⚑"})]
        for task in draw.sample(TASKS, 24)
    ]  # fmt: skip
    return (
        f"<header><h1>Issues</h1>{buttons(('New issue', 'Labels', 'Milestones'))}{search('Search issues')}"
        f'<span role="tablist">{buttons(("Open 24", "Closed 310", "Mine"), "tab")}</span></header><main><nav>'
        f"{links(('Code', 'Issues', 'Merge requests', 'Pipelines', 'Releases', 'Wiki', 'Insights'))}</nav><section>"
        f"{table(('No.', 'Title', 'Label', 'Author', 'Comments', 'Changed', ''), rows, 1)}</section></main>"
    )


def chat(draw: Draw) -> str:
    said = "".join(
        f"<h2>{person}, {day(draw)}</h2><p>{subject}: see {links([draw.choice(FILES)])}, please."
        f" {icons({'Answer': '↶', 'React': '☺', 'Copy': '⧉', 'More': '…'})}</p>"
        for person, subject in zip(draw.sample(PEOPLE, 17), draw.sample(SUBJECTS, 17), strict=True)
    )
    return (
        f"<header><h1>{draw.choice(CITIES)} office</h1>{icons({'Call': '☎', 'Pin': '⚑', 'Mute': '♪'})}{search('Search')}"
        f"</header><main><nav><h2>Rooms</h2>{links(draw.sample(CITIES, 11))}<h2>People</h2>{links(draw.sample(PEOPLE, 12))}"
        f"</nav><section>{said}<label class='above'>Message <textarea cols='60'></textarea></label>"
        f"{buttons(('Send', 'Attach', 'Schedule'))}</section><aside><h2>Files</h2>{links(draw.sample(FILES, 9))}</aside></main>"
    )


def timetable(draw: Draw) -> str:
    rows = [
        [f"{draw.choice(('IC', 'RE', 'EC'))} {draw.randint(100, 999)}", f"{draw.randint(5, 23)}:{draw.randint(10, 59)}",
         *draw.sample(CITIES, 2), str(draw.randint(1, 24)), draw.choice(("on time", "5 min late", "cancelled")),
         f"{draw.uniform(9, 120):.2f}", buttons(("Book", "Map"))]
        for _ in range(27)
    ]  # fmt: skip
    head = ("Train", "Leaves", "Via", "To", "Platform", "State", "Fare", "")
    return (
        f"<header><h1>Departures</h1>{field('From', draw.choice(CITIES))}{field('To')}{field('Day', '', 'date')}"
        f"{buttons(('Search', 'Swap', 'Earlier', 'Later'))}{links(('Fares', 'Lost property', 'Disruptions'))}</header>"
        f"<main><section>{table(head, rows)}</section></main>"
    )


def drawing(draw: Draw) -> str:
    tools = {"Select": "➤", "Pen": "✒", "Pencil": "✎", "Scissors": "✂", "Star": "★", "Circle": "●", "Square": "■",
             "Triangle": "▲", "Text": "✍", "Fill": "◧", "Zoom in": "⊕", "Zoom out": "⊖", "Rotate": "⟳", "Mirror": "⇋"}  # fmt: skip
    layers = [
        [name, icons({"Show": "◉", "Lock": "⚿", "Move up": "▲", "Move down": "▼", "Remove": "✖"})]
        for name in draw.sample(THINGS, 22)
    ]
    numbers = "".join(field(each, str(draw.randint(0, 900)), "number") for each in ("Left", "Top", "Width", "Height"))
    shapes = "".join(
        f'<circle cx="{draw.randint(30, 1000)}" cy="{draw.randint(30, 700)}" r="{draw.randint(10, 120)}" '
        f'fill="hsl({draw.randint(0, 359)} 60% 60%)"/>' for _ in range(18)
    )  # fmt: skip
    menu = buttons(("File", "Edit", "Layer", "Object", "Path", "Filters", "Window", "Help"), "menuitem")
    return (
        f'<header role="menubar">{menu}</header><header>{icons(tools)}{buttons(("Snap", "Group", "Ungroup", "Align"))}'
        f'</header><main><section><svg width="1050" height="760">{shapes}</svg></section><aside><h2>Place</h2>{numbers}'
        f"{choice('Blend', ('Normal', 'Screen'))}<h2>Layers</h2>{table(('Layer', ''), layers)}</aside></main>"
    )


def music(draw: Draw) -> str:
    rows = [
        [icons({"Play": "▶"}), f"{draw.choice(('Slow', 'Late', 'Blue', 'First', 'Last'))} {thing.lower()}",
         f'<a href="#a">{draw.choice(PEOPLE)}</a>', f"{draw.randint(1, 9)}:{draw.randint(10, 59)}",
         str(draw.randint(1960, 2025)), icons({"Like": "♡", "Queue": "☰", "Share": "➦"})]
        for thing in draw.sample(THINGS, 28)
    ]  # fmt: skip
    keys = {"Previous": "⏮", "Pause": "⏸", "Next": "⏭", "Shuffle": "⤮", "Repeat": "↻", "Louder": "♫"}
    return (
        f"<header><h1>Library</h1>{search('Songs and artists')}{buttons(('Import', 'Rip a disc', 'Equaliser'))}</header>"
        f"<main><nav><h2>Lists</h2>{links(draw.sample(SUBJECTS, 14))}{buttons(('New list',))}</nav><section>"
        f"{table(('', 'Title', 'Artist', 'Length', 'Year', ''), rows, 1)}</section></main><footer>{icons(keys)}</footer>"
    )


KINDS: tuple[Callable[[Draw], str], ...] = (
    mail, sheet, settings, calendar, files, users, form, dialog, board, shop, dashboard, issues, chat, timetable,
    drawing, music,
)  # fmt: skip


def lay_out(out: Path, sqlite: Path, docs: Path, episodes: Path | None) -> int:
    """Write and copy the pages into ``out``; how many there are."""
    for turn in range(2):
        for number, kind in enumerate(KINDS):
            name = kind.__name__
            write(out / "app" / f"{name}-{turn + 1}.html", page(name, kind(Draw(f"{name} {turn}")), number + turn))
    for source, names, folder in ((sqlite, SQLITE, "sqlite"), (docs, DOCS, "docs")):
        # What pages need, without the pages.
        shutil.copytree(source, out / folder, ignore=shutil.ignore_patterns("*.html"), dirs_exist_ok=True)
        for name in names:
            (out / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / f"{name}.html", out / folder / f"{name}.html")
    if episodes is not None:
        for path in sorted(episodes.glob("*.html")):
            write(out / "viewer" / path.name, path.read_text(encoding="utf-8"))
    return len(list(out.rglob("*.html")))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Lays out the pages behind IVT-Screens-v0.")
    parser.add_argument("--out", type=Path, default=Path("build/pages"), help="default: %(default)s")
    parser.add_argument("--sqlite", type=Path, default=Path("/usr/share/doc/sqlite3"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=Path("build/docs"), help="of this project (%(default)s)")
    parser.add_argument("--episodes", type=Path, help="folder with pages of `ivt view` and of reports")
    args = parser.parse_args()
    print(f"{args.out}: {lay_out(args.out, args.sqlite, args.docs, args.episodes)} pages")


if __name__ == "__main__":
    main()
