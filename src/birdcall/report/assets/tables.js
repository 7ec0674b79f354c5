'use strict';
// Make every table.sortable sortable by its headings, and filterable by words. DataTables is a
// module; the page imports it from a blob, as itables does in a notebook without a network.
const tablesReady = (async () => {
  const source = JSON.parse(document.getElementById('datatables').textContent);
  const url = URL.createObjectURL(new Blob([source], { type: 'text/javascript' }));
  const { jQuery } = await import(url);
  URL.revokeObjectURL(url);
  for (const table of document.querySelectorAll('table.sortable')) {
    const caption = table.caption.textContent;
    const dataTable = jQuery(table).DataTable({
      order: [],
      pageLength: 25,
      lengthMenu: [10, 25, 100, { label: 'all', value: -1 }],
      autoWidth: false,
      caption,
      language: {
        search: 'Filter', lengthMenu: 'Rows _MENU_', info: 'Rows _START_ to _END_ of _TOTAL_',
        infoEmpty: 'No rows', infoFiltered: '(of _MAX_)', zeroRecords: 'No row contains these words',
        emptyTable: 'No rows',
      },
      layout: { topStart: 'search', topEnd: 'pageLength' },
    });
    for (const input of dataTable.table().container().querySelectorAll('input[type=search]')) {
      input.setAttribute('aria-label', `Filter: ${caption.slice(0, 60)}`);
    }
  }
})();

function markReady() {
  document.body.dataset.ready = 'yes';
}

// On a page with charts, report.js waits for the tables.
if (!document.querySelector('[data-chart]')) tablesReady.then(markReady);
