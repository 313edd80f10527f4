/** The page around its tabs: who is connected, and how; what to do when the server says no. */

import { type CloseReason, Code, connect, type Socket, type SocketState } from 'udpack';
import { button, type Child, h, type IconName, icon, setAttribute, setText } from '../base/dom.js';
import { duration } from '../base/format.js';
import { announce, notices } from '../base/notice.js';
import { begin, type Mount, type Mounted, type Rights, type Session } from './session.js';
import { t } from './text.js';
import { forgetToken, isOnce, keepToken, takeToken, tokenOf } from './token.js';

export interface Tab {
  name: 'upload' | 'files' | 'activity';
  icon: IconName;
  /** Whether the token has something to see there. */
  for(rights: Rights): boolean;
  mount: Mount;
}

/** The wait before a first connect is tried again, in milliseconds: it doubles up to the most. */
const WAIT = { first: 1000, most: 30_000 };

type Look = 'good' | 'busy' | 'bad';

export class Frame {
  private readonly stateText = h('span', {});
  private readonly state = h('div', { class: 'state', role: 'status' }, h('span', { class: 'dot', 'aria-hidden': 'true' }), this.stateText);
  private readonly tabs = h('div', { class: 'tabs', role: 'tablist', 'aria-label': t('sections') });
  private readonly main = h('main', { id: 'main', tabindex: -1 });
  private mounted: { name: string; tab: HTMLElement; panel: HTMLElement; mounted: Mounted }[] = [];
  private countdown: ReturnType<typeof setInterval> | undefined;

  constructor(
    root: HTMLElement,
    private readonly all: readonly Tab[],
  ) {
    const brand = h('div', { class: 'brand' }, h('img', { src: 'icon.svg', alt: '', width: 26, height: 26 }), h('h1', {}, 'udpack'));
    const skip = h('a', { class: 'skip', href: '#main', onclick: (event: Event) => (event.preventDefault(), this.main.focus()) }, t('skip'));
    root.append(skip, h('header', { class: 'top' }, brand, this.tabs, this.state), this.main, ...notices());
    this.tabs.hidden = true;
    addEventListener('hashchange', () => {
      // Another link was opened in this tab.
      if (tokenOf(location.hash) !== undefined) {
        takeToken();
        location.reload();
      }
    });
  }

  /** Connects with the token of the link, and keeps the page on its server until it is closed. */
  async run(): Promise<void> {
    const token = takeToken();
    if (!isSecureContext) {
      return this.stop(t('insecure'));
    }
    if (token === undefined) {
      return this.askToken();
    }
    for (let wait = WAIT.first; ; wait = Math.min(wait * 2, WAIT.most)) {
      this.show('busy', t('connecting'));
      let reason: CloseReason;
      try {
        const socket = await connect({ token, agent: 'udpack page' });
        const session = await begin(socket, token).catch((error: unknown) => {
          void socket.close();
          throw error;
        });
        wait = WAIT.first;
        this.enter(session);
        reason = await this.follow(socket);
        this.leave();
      } catch (error) {
        const { reason: why, message } = error as { reason?: CloseReason; message: string };
        if (why === undefined) {
          return this.stop(t('ended', { reason: message }));
        }
        reason = why;
      }
      const text = reason.code === Code.AUTH_FAILED && isOnce(token) ? t('used') : advice(reason);
      if (!reason.retry) {
        return this.stop(text, reason.code === Code.AUTH_FAILED);
      }
      await this.waitToRetry(text, wait);
    }
  }

  /** Follows the states of a socket until it is over. */
  private async follow(socket: Socket): Promise<CloseReason> {
    const online = (): void => socket.reconnectNow();
    addEventListener('online', online);
    const stop = socket.on('state', (state) => this.showState(state, socket));
    this.showState(socket.state, socket);
    const reason = await socket.closed;
    stop();
    removeEventListener('online', online);
    return reason;
  }

  private showState(state: SocketState, socket: Socket): void {
    switch (state.state) {
      case 'connecting':
        return this.show('busy', t('connecting'));
      case 'connected':
        return this.show('good', t(socket.transport === 'wss' ? 'connectedTcp' : 'connected'));
      case 'goingAway':
        return this.show('busy', t('goingAway'));
      case 'reconnecting': {
        const at = performance.now() + state.retryInMs;
        const tell = (): void => {
          const left = at - performance.now();
          this.show('busy', left > 500 ? t('reconnecting', { time: duration(left) }) : t('reconnectingNow'), true);
        };
        tell();
        this.countdown = setInterval(tell, 1000);
        this.state.append(button(t('tryNow'), () => socket.reconnectNow(), { class: 'button small' }));
        return;
      }
      default:
        return this.show('bad', t('notConnected'));
    }
  }

  private show(look: Look, text: string, counting = false): void {
    if (!counting) {
      clearInterval(this.countdown);
      this.state.querySelector('button')?.remove();
    }
    setAttribute(this.state, 'data-look', look);
    // A countdown that is read out each second is a nuisance.
    setAttribute(this.state, 'aria-live', counting ? 'off' : 'polite');
    setText(this.stateText, text);
  }

  private enter(session: Session): void {
    this.main.replaceChildren();
    const tabs = this.all.filter((tab) => tab.for(session.rights));
    this.mounted = [];
    for (const { name, icon: drawing, mount } of tabs) {
      const tab = h('button', { type: 'button', role: 'tab', id: `tab-${name}`, 'aria-controls': `panel-${name}`, onclick: () => this.select(name) }, icon(drawing), h('span', {}, t(name)));
      const panel = h('section', { role: 'tabpanel', id: `panel-${name}`, class: `panel ${name}`, 'aria-labelledby': tab.id });
      this.tabs.append(tab);
      this.main.append(panel);
      this.mounted.push({ name, tab, panel, mounted: mount(panel, session) });
    }
    this.tabs.onkeydown = (event) => this.tabKey(event);
    this.tabs.hidden = tabs.length < 2;
    const wanted = history.state as { tab?: string } | null;
    this.select(tabs.some(({ name }) => name === wanted?.tab) ? (wanted?.tab as string) : (tabs[0]?.name ?? ''));
  }

  private select(selected: string): void {
    for (const { name, tab, panel, mounted } of this.mounted) {
      const visible = name === selected;
      setAttribute(tab, 'aria-selected', visible ? 'true' : 'false');
      setAttribute(tab, 'tabindex', visible ? 0 : -1);
      panel.hidden = !visible;
      mounted.shown?.(visible);
    }
    history.replaceState({ ...(history.state as object | null), tab: selected }, '');
  }

  private tabKey(event: KeyboardEvent): void {
    const at = this.mounted.findIndex(({ tab }) => tab === document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (at >= 0 && step !== undefined) {
      const next = this.mounted[(at + step + this.mounted.length) % this.mounted.length];
      this.select(next?.name ?? '');
      next?.tab.focus();
    }
  }

  private leave(): void {
    for (const { mounted } of this.mounted) {
      mounted.unmount();
    }
    this.mounted = [];
    this.tabs.replaceChildren();
    this.tabs.hidden = true;
    this.main.replaceChildren();
  }

  /** Says why there is no connection, and waits. */
  private async waitToRetry(text: string, ms: number): Promise<void> {
    this.show('bad', t('notConnected'));
    const until = performance.now() + ms;
    const left = h('p', { class: 'quiet' });
    await new Promise<void>((resolve) => {
      const now = button(t('tryNow'), () => resolve(), { class: 'button primary', icon: 'retry' });
      const tell = (): void => {
        const rest = until - performance.now();
        setText(left, t('retryIn', { time: duration(rest) }));
        if (rest <= 0) {
          resolve();
        }
      };
      tell();
      this.countdown = setInterval(tell, 250);
      addEventListener('online', () => resolve(), { once: true });
      this.message(text, left, now);
    });
    clearInterval(this.countdown);
  }

  /** Says why there will be no connection with this link. */
  private stop(text: string, wrongToken = false): void {
    this.show('bad', t('refused'));
    if (wrongToken) {
      forgetToken();
    }
    this.message(text, button(t('otherLink'), () => this.askToken(), { class: 'button' }));
  }

  private message(text: string, ...more: Child[]): void {
    this.main.replaceChildren(h('div', { class: 'card', role: 'alert' }, icon('warning'), h('p', {}, text), ...more));
  }

  private askToken(): void {
    this.show('bad', t('notConnected'));
    const input = h('input', { id: 'token', type: 'text', autocomplete: 'off', spellcheck: 'false', 'aria-describedby': 'token-hint', required: true });
    const onsubmit = (event: Event): void => {
      event.preventDefault();
      const text = input.value.trim();
      const at = text.indexOf('#');
      const token = at >= 0 ? tokenOf(text.slice(at)) : text;
      if (token !== undefined && token !== '') {
        keepToken(token);
        location.reload();
      }
    };
    const form = h(
      'form',
      { class: 'card', onsubmit },
      h('h2', {}, t('tokenTitle')),
      h('p', { id: 'token-hint', class: 'quiet' }, t('tokenHint')),
      h('label', { for: 'token' }, t('link')),
      input,
      h('button', { type: 'submit', class: 'button primary' }, t('open')),
    );
    this.main.replaceChildren(form);
    input.focus();
    announce(t('tokenTitle'));
  }
}

/** What to do about a refusal or a lost connection. */
function advice(reason: CloseReason): string {
  switch (reason.code) {
    case Code.AUTH_FAILED:
      return t('wrong');
    case Code.AUTH_EXPIRED:
      return t('expired');
    case Code.AUTH_REVOKED:
      return t('revoked');
    case Code.FORBIDDEN:
      return t('forbidden', { reason: reason.text || reason.name });
    case Code.SERVER_BUSY:
    case Code.RATE_LIMITED:
    case Code.SHUTTING_DOWN:
      return t('busy');
    case Code.CONNECTION_LOST:
    case Code.TIMED_OUT:
    case Code.TRANSPORT_ERROR:
      return t('unreachable');
    case Code.VERSION:
    case Code.BAD_MESSAGE:
    case Code.PROTOCOL_ORDER:
      return t('badServer');
    default:
      return t('ended', { reason: reason.text || reason.name });
  }
}
