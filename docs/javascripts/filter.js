// SPDX-License-Identifier: Apache-2.0
// A field above each long table, which leaves the rows that hold all of its words: `vmamba 8xb128`.

function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 12) return;
  const field = document.createElement('input');
  field.type = 'search';
  field.className = 'table-filter';
  field.placeholder = 'Filter rows';
  field.setAttribute('aria-label', 'Filter the rows of the table below by words');
  const count = document.createElement('output');
  field.addEventListener('input', () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = shown === rows.length ? '' : ` ${shown} of ${rows.length}`;
  });
  const place = table.closest('.md-typeset__scrollwrap') || table;
  place.before(field, count);
}

document.addEventListener('DOMContentLoaded', () => document.querySelectorAll('article table').forEach(addFilter));
