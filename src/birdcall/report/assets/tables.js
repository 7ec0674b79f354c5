'use strict';
// Every table.sortable becomes sortable by its headings and filterable by words and by columns.
window.birdcallTables('table.sortable').each((_, table) => {
  const caption = table.caption ? table.caption.textContent : 'table';
  const made = window.birdcallTables(table).DataTable({
    order: [],
    pageLength: 25,
    lengthMenu: [10, 25, 100, { label: 'all', value: -1 }],
    autoWidth: false,
    caption: caption,
    language: { search: 'Filter', lengthMenu: 'Rows _MENU_', info: '_START_ to _END_ of _TOTAL_',
      infoEmpty: 'no rows', infoFiltered: '(of _MAX_)', zeroRecords: 'no row has these words',
      emptyTable: 'nothing here' },
    layout: { topStart: 'search', topEnd: 'pageLength' },
  });
  made.table().container().querySelectorAll('input[type=search]').forEach((input) => {
    input.setAttribute('aria-label', `Filter: ${caption.slice(0, 60)}`);
  });
});
if (!document.querySelector('[data-chart]')) document.body.dataset.ready = 'yes';
