// Run in a page as the body of a function: what can be named on it, with its box in pixels of the page.
const clean = text => (text || '').replace(/\s+/g, ' ').trim();
const shown = element => element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
const said = element => element.getAttribute('aria-label') || element.innerText;
const kinds = [
  ['tab', '[role=tab]'], ['menu item', '[role=menuitem]'], ['switch', '[role=switch]'],
  ['checkbox', 'input[type=checkbox]'], ['radio button', 'input[type=radio]'], ['list', 'select'],
  ['search field', 'input[type=search]'],
  ['field', 'input:not([type]), input[type=text], input[type=email], input[type=date], input[type=number], textarea'],
  ['button', 'button, input[type=submit], [role=button]'], ['link', 'a[href]'], ['cell', 'td'],
];
const rowName = row => row && clean((row.querySelector('th[scope=row]') || row.querySelector('td') || row).innerText);
const headings = [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter(shown);
const found = [], taken = new Set();
for (const [kind, selector] of kinds) for (const element of document.querySelectorAll(selector)) {
  if (taken.has(element) || !shown(element) || element.closest('[inert], [aria-hidden=true]')) continue;
  taken.add(element);
  const row = element.closest('tr');
  let noun = kind, name = '';
  if (kind === 'cell') {
    const head = element.closest('table').querySelector('thead tr');
    if (!head || element.colSpan > 1 || !clean(element.innerText)) continue;
    name = clean(head.children[element.cellIndex] && head.children[element.cellIndex].innerText);
  } else if (element.matches('input, select, textarea')) {
    const label = element.labels && element.labels[0];
    const own = label && [...label.childNodes].filter(node => node !== element).map(node => node.textContent).join(' ');
    name = clean(element.getAttribute('aria-label') || own || element.placeholder || element.value);
  } else {
    name = clean(said(element));
    if ((kind === 'button' || kind === 'link') && !/[\p{L}\p{N}]/u.test(element.innerText)) noun = 'icon';
  }
  const rects = element.getClientRects(), r = rects[0];
  let whole = rects.length === 1 && r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight;
  whole = whole && r.width >= 4 && r.height >= 4;
  for (const [x, y] of whole ? [[.5, .5], [.1, .2], [.9, .8]] : []) {
    const top = document.elementFromPoint(r.left + x * r.width, r.top + y * r.height);
    whole = whole && (element === top || element.contains(top));
  }
  const above = headings.filter(h => h.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING).pop();
  found.push({noun, name, row: rowName(row) || '', heading: above ? clean(above.innerText) : '',
              box: whole ? [r.left, r.top, r.right, r.bottom] : null});
}
return found;
