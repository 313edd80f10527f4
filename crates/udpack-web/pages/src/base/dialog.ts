/** Modal questions: the browser's own dialog, which keeps the focus, closes by Escape and gives the focus back. */

import { button, type Child, h, iconButton } from './dom.js';
import { texts } from './text.js';

const t = texts('dialog', { close: 'Close' }, { close: '关闭' });

export interface Action<V> {
  label: string;
  value: V;
  kind?: 'primary' | 'danger';
  disabled?: boolean;
}

let count = 0;

/**
 * Shows a dialog until one of the actions is taken; resolves with its value, and with undefined when it was closed.
 * The first action marked `primary` has the focus unless an element of the body has `autofocus`.
 */
export function ask<V>(title: string, body: Child[], actions: readonly Action<V>[], options: { class?: string; onopen?: () => void } = {}): Promise<V | undefined> {
  return new Promise((resolve) => {
    const id = `dialog-${(count += 1)}`;
    let chosen: V | undefined;
    const buttons = actions.map(({ label, value, kind, disabled }) => {
      const made = button(
        label,
        () => {
          chosen = value;
          dialog.close();
        },
        { class: `button ${kind ?? ''}` },
      );
      made.disabled = disabled ?? false;
      return made;
    });
    const dialog: HTMLDialogElement = h(
      'dialog',
      {
        class: options.class,
        'aria-labelledby': id,
        onclose: (): void => {
          dialog.remove();
          resolve(chosen);
        },
        onclick: (event: MouseEvent): void => {
          if (event.target === dialog) {
            dialog.close();
          }
        },
      },
      h('div', { class: 'dialog' }, h('header', {}, h('h2', { id }, title), iconButton('close', t('close'), (): void => dialog.close())), ...body, buttons.length > 0 && h('footer', {}, ...buttons)),
    );
    document.body.append(dialog);
    dialog.showModal();
    const focused = dialog.querySelector<HTMLElement>('[autofocus]') ?? buttons[actions.findIndex(({ kind }) => kind === 'primary')];
    focused?.focus();
    options.onopen?.();
  });
}
