/** Numbers and times as people read them, in the language of the page. */

import { language, texts } from './text.js';

const t = texts(
  'format',
  {
    perSecond: '{amount}/s',
    seconds: '{n} s',
    minutes: '{n} min',
    minutesSeconds: '{n} min {s} s',
    hoursMinutes: '{n} h {m} min',
    days: '{n} {n|day|days}',
  },
  {
    perSecond: '{amount}/秒',
    seconds: '{n} 秒',
    minutes: '{n} 分钟',
    minutesSeconds: '{n} 分 {s} 秒',
    hoursMinutes: '{n} 小时 {m} 分',
    days: '{n} 天',
  },
);

const locale = language === 'zh' ? 'zh-CN' : 'en-GB';
const UNITS = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];

/** `1.2 MB`: decimal units, three digits at most before the unit changes. */
export function bytes(count: number): string {
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : 1;
  return `${number(value, digits)} ${UNITS[unit]}`;
}

/** `12.3 MB/s`. */
export function rate(bytesPerSecond: number): string {
  return t('perSecond', { amount: bytes(bytesPerSecond) });
}

/** `45 s`, `3 min 20 s`, `2 h 5 min`: two parts at most. */
export function duration(ms: number): string {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) {
    return t('seconds', { n: seconds });
  }
  const minutes = Math.floor(seconds / 60);
  if (minutes < 10 && seconds % 60 > 0) {
    return t('minutesSeconds', { n: minutes, s: seconds % 60 });
  }
  if (minutes < 60) {
    return t('minutes', { n: minutes });
  }
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? t('hoursMinutes', { n: hours, m: minutes % 60 }) : t('days', { n: Math.round(hours / 24) });
}

/** `42 %`; 100 % only where all is there. */
export function percent(part: number, whole: number): string {
  return `${Math.floor((whole > 0 ? Math.min(1, part / whole) : 1) * 100)} %`;
}

/** A count with separators, or a number with so many digits behind the point. */
export function number(value: number, digits = 0): string {
  return value.toLocaleString(locale, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const dateTime = new Intl.DateTimeFormat(locale, { year: 'numeric', month: '2-digit', day: '2-digit', hour: '2-digit', minute: '2-digit' });

/** Date and time, from seconds since 1970. */
export function time(seconds: number): string {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? '' : dateTime.format(date);
}

/** Compares names as people sort them: `2` before `10`. */
export const compareNames: (a: string, b: string) => number = new Intl.Collator(locale, { numeric: true }).compare;

/** Bytes as hexadecimal digits. */
export function hex(data: Uint8Array): string {
  return Array.from(data, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
